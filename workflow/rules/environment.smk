"""
Checks the nodes before anything is trained on them: versions, GPUs, disk, clocks; builds DeepSpeed's ops once.
IN   the nodes
OUT  results/<run>/environment.json   (only when all is well; else environment.json.failed.json says what is not)
"""


rule environment:
    output:
        "results/{run}/environment.json",
    log:
        "results/{run}/logs/environment.log",
    benchmark:
        "results/{run}/benchmarks/environment.tsv"
    conda:
        "../../envs/job.yaml"
    threads: job_threads(lambda wildcards: "environment")
    resources:
        **job_resources(lambda wildcards: "environment"),
    params:
        spec=spec_key(PLAN, "environment"),
        launch=launch_of("environment"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
