"""
Pins and downloads what the config names on the hub, and collects the demo's text; on the machine that runs Snakemake.
IN   the config
OUT  results/<run>.lock.json   (revisions, files, the pretrained model's sizes); then the files of every job are rendered
"""


localrules:
    fetch,


rule fetch:
    output:
        PLAN.paths.lock,
    log:
        PLAN.paths.logs / "fetch.log",
    params:
        spec=fetch_key(PLAN),
        config=CONFIG,
    shell:
        "(longhaul fetch {params.config:q} --out {output:q} && longhaul job render {params.config:q}) >> {log:q} 2>&1"
