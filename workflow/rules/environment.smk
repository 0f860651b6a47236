"""
Checks the nodes before training: versions, GPUs, disk, clocks. Builds DeepSpeed's ops once per node.
IN   the nodes
OUT  results/<run>/environment.json   (only if every check passed; else environment.json.failed.json lists the problems)
"""


rule environment:
    output:
        "results/{run}/environment.json",
    log:
        "results/{run}/logs/environment.log",
    benchmark:
        "results/{run}/benchmarks/environment.tsv"
    threads: JOBS.threads("environment")
    resources:
        **JOBS.resources("environment"),
    params:
        **JOBS.params("environment"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
