"""
Pins and downloads what the config names on the hub, and collects the demo's text; on the machine that runs Snakemake.
IN   the config
OUT  results/<run>.lock.json   (revisions, files, the pretrained model's sizes); then the files of every job are rendered
     results/<run>/task_data/<stage>/<task>.json   (of an evaluation task; the data are beside it)

Each task has a lock of its own: a task that is added to a finished run pins nothing again, and evaluates nothing else.
"""


localrules:
    fetch,
    fetch_task_data,


rule fetch:
    output:
        PLAN.paths.lock,
    log:
        PLAN.paths.logs / "fetch.log",
    params:
        spec=fetch_key(PLAN),
        config=CONFIG,
    shell:
        "(longhaul fetch {params.config:q} --only sources && longhaul job render {params.config:q}) >> {log:q} 2>&1"


rule fetch_task_data:
    output:
        "results/{run}/task_data/{stage}/{task}.json",
    log:
        "results/{run}/logs/fetch_task_data/{stage}/{task}.log",
    params:
        spec=lambda wildcards: task_data_key(PLAN, wildcards.stage, wildcards.task),
        config=CONFIG,
    shell:
        "longhaul fetch {params.config:q} --only {wildcards.stage:q}/{wildcards.task:q} >> {log:q} 2>&1"
