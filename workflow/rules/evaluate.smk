"""
Evaluates a stage's export, and the model that it starts from if asked, on one task of lm-evaluation-harness.
IN   results/<run>/export/<stage>.json; results/<run>/task_data/<stage>/<task>.json; the user's files of the task
OUT  results/<run>/evaluation/<stage>/<model>/<task>.json   (model: trained or start)
"""


rule evaluate:
    input:
        LOCK,
        lambda wildcards: evaluation_inputs(
            PLAN, job_kinds()["evaluate"].job_id(wildcards)
        ),
    output:
        "results/{run}/evaluation/{stage}/{model}/{task}.json",
    log:
        "results/{run}/logs/evaluate/{stage}-{model}-{task}.log",
    benchmark:
        "results/{run}/benchmarks/evaluate/{stage}-{model}-{task}.tsv"
    threads: JOBS.threads("evaluate")
    resources:
        **JOBS.resources("evaluate"),
    params:
        **JOBS.params("evaluate"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
