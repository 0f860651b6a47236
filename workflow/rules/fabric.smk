"""
Measures the network between the ranks and compares it with the site's limits.
IN   results/<run>/environment.json
OUT  results/<run>/fabric.json   (only when all is well; else fabric.json.failed.json says what is not)
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
    conda:
        "../../envs/job.yaml"
    threads: job_threads(lambda wildcards: "fabric")
    resources:
        **job_resources(lambda wildcards: "fabric"),
    params:
        spec=spec_key(PLAN, "fabric"),
        launch=launch_of("fabric"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
