"""
Pins and downloads what the config names on the hub, and collects the demo's text; on the machine that runs Snakemake.
IN   the config
OUT  results/<run>.lock.json   (revisions, files, the pretrained model's geometry); then every job is rendered
"""


localrules:
    fetch,


rule fetch:
    output:
        f"results/{PLAN.run}.lock.json",
    log:
        f"results/{PLAN.run}/logs/fetch.log",
    conda:
        "../../envs/controller.yaml"
    params:
        spec=source_key(PLAN),
        config=CONFIG,
    shell:
        "(longhaul fetch {params.config:q} --out {output:q} && longhaul render {params.config:q}) >> {log:q} 2>&1"
