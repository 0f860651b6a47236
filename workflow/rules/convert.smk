"""
Exports a stage's checkpoint as a Hugging Face folder and proves it: every tensor, the logits, no missing key.
IN   results/<run>/stages/<stage>/checkpoint.json
OUT  results/<run>/export/<stage>.json   (the folder of the same name beside it)
"""


rule convert:
    input:
        checkpoint="results/{run}/stages/{stage}/checkpoint.json",
    output:
        "results/{run}/export/{stage}.json",
    log:
        "results/{run}/logs/convert/{stage}.log",
    benchmark:
        "results/{run}/benchmarks/convert/{stage}.tsv"
    conda:
        "../../envs/job.yaml"
    threads: job_threads(lambda wildcards: f"convert-{wildcards.stage}")
    resources:
        **job_resources(lambda wildcards: f"convert-{wildcards.stage}"),
    params:
        spec=lambda wildcards: spec_key(PLAN, f"convert-{wildcards.stage}"),
        launch=lambda wildcards: launch_of(f"convert-{wildcards.stage}"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
