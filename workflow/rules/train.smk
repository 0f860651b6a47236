"""
Trains one stage of the plan; the same rule serves every stage.
IN   results/<run>/stages/<stage>/spec.json; its data; the checkpoint.json it starts from; the checks passed
OUT  results/<run>/stages/<stage>/checkpoint.json   (written last, after a verified save)

Weights are no output: Snakemake deletes outputs before a rerun. They lie in <stage>/weights/<hash of all they depend on>.
"""


rule train_stage:
    input:
        spec="results/{run}/stages/{stage}/spec.json",
        data=lambda wildcards: f"results/{PLAN.run}/data/{PLAN.stage(wildcards.stage).stage.dataset}.json",
        start=starting_checkpoint,
        fabric=ancient("results/{run}/fabric.json"),
    output:
        "results/{run}/stages/{stage}/checkpoint.json",
    log:
        "results/{run}/logs/train_stage/{stage}.log",
    benchmark:
        "results/{run}/benchmarks/train_stage/{stage}.tsv"
    conda:
        "../../envs/job.yaml"
    threads: job_threads(lambda wildcards: f"train-{wildcards.stage}")
    resources:
        **job_resources(lambda wildcards: f"train-{wildcards.stage}"),
    params:
        launch=lambda wildcards: launch_of(f"train-{wildcards.stage}"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
