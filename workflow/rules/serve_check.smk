"""
Starts a server of a stage's export, compares its answers with the trainer's values, measures it under load, and stops it.
IN   results/<run>/export/<stage>.json
OUT  results/<run>/serve_check/<stage>.json
"""


rule serve_check:
    input:
        LOCK,
        "results/{run}/export/{stage}.json",
    output:
        "results/{run}/serve_check/{stage}.json",
    log:
        "results/{run}/logs/serve_check/{stage}.log",
    benchmark:
        "results/{run}/benchmarks/serve_check/{stage}.tsv"
    threads: JOBS.threads("serve_check")
    resources:
        **JOBS.resources("serve_check"),
    params:
        **JOBS.params("serve_check"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
