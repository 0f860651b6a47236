"""
Exports a stage's checkpoint as a Hugging Face folder and proves it: every tensor, the logits, no missing key.
IN   results/<run>/stages/<stage>/checkpoint.json;  results/<run>/jobs/convert-<stage>/{launch.sh,job.json}
OUT  results/<run>/export/<stage>.json   (the folder of the same name beside it)
"""


rule convert:
    input:
        checkpoint="results/{run}/stages/{stage}/checkpoint.json",
        launch=ancient("results/{run}/jobs/convert-{stage}/launch.sh"),
    output:
        "results/{run}/export/{stage}.json",
    log:
        "results/{run}/logs/convert/{stage}.log",
    benchmark:
        "results/{run}/benchmarks/convert/{stage}.tsv"
    params:
        spec=lambda wildcards: spec_key(PLAN, f"convert-{wildcards.stage}"),
    threads: job_threads(lambda wildcards: f"convert-{wildcards.stage}")
    resources:
        **job_resources(lambda wildcards: f"convert-{wildcards.stage}"),
    shell:
        "bash {input.launch:q} >> {log:q} 2>&1"
