"""
Trains one stage of the plan; the same rule serves every stage.
IN   results/<run>/stages/<stage>/result_spec.json; the dataset; the checkpoint.json that the stage starts from; the passed checks;
     the counts of all stages' chats
OUT  results/<run>/stages/<stage>/checkpoint.json   (written last, after a verified save)

Weights are no output, as Snakemake deletes outputs before a rerun. They are in <stage>/weights/<hash of all they depend on>.
"""


rule train:
    input:
        result_spec="results/{run}/stages/{stage}/result_spec.json",
        data=stage_data,
        start=starting_checkpoint,
        fabric=ancient("results/{run}/fabric.json"),
        scale_test=passed_scale_test,
        # Their jobs refuse chats that are too long for a stage, which must not wait for the stages before it.
        chats=counted_chats,
    output:
        "results/{run}/stages/{stage}/checkpoint.json",
    log:
        "results/{run}/logs/train/{stage}.log",
    benchmark:
        "results/{run}/benchmarks/train/{stage}.tsv"
    threads: JOBS.threads("train")
    resources:
        **JOBS.resources("train"),
    params:
        launch=JOBS.params("train")["launch"],
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
