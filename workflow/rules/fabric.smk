"""
Measures the network between the ranks and compares it with the site's limits.
IN   results/<run>/environment.json
OUT  results/<run>/fabric.json   (only if every limit is met; else fabric.json.failed.json lists the problems)
"""


rule fabric:
    input:
        environment="results/{run}/environment.json",
    output:
        "results/{run}/fabric.json",
    log:
        "results/{run}/logs/fabric.log",
    benchmark:
        "results/{run}/benchmarks/fabric.tsv"
    threads: JOBS.threads("fabric")
    resources:
        **JOBS.resources("fabric"),
    params:
        **JOBS.params("fabric"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
