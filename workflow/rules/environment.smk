"""
Checks the nodes before anything is trained on them: versions, GPUs, disk, clocks; builds DeepSpeed's ops once.
IN   results/<run>/jobs/environment/{launch.sh,job.json}
OUT  results/<run>/environment.json   (only when all is well; else environment.json.failed.json says what is not)
"""


rule environment:
    input:
        launch=ancient("results/{run}/jobs/environment/launch.sh"),
    output:
        "results/{run}/environment.json",
    log:
        "results/{run}/logs/environment.log",
    benchmark:
        "results/{run}/benchmarks/environment.tsv"
    params:
        spec=spec_key(PLAN, "environment"),
    threads: job_threads(lambda wildcards: "environment")
    resources:
        **job_resources(lambda wildcards: "environment"),
    shell:
        "bash {input.launch:q} >> {log:q} 2>&1"
