"""
Measures the network between the ranks and compares it with the site's floors.
IN   results/<run>/jobs/fabric/{launch.sh,job.json};  the environment check passed
OUT  results/<run>/fabric.json   (only when all is well; else fabric.json.failed.json says what is not)
"""


rule fabric:
    input:
        launch=ancient("results/{run}/jobs/fabric/launch.sh"),
        environment=ancient("results/{run}/environment.json"),
    output:
        "results/{run}/fabric.json",
    log:
        "results/{run}/logs/fabric.log",
    benchmark:
        "results/{run}/benchmarks/fabric.tsv"
    params:
        spec=spec_key(PLAN, "fabric"),
    threads: job_threads(lambda wildcards: "fabric")
    resources:
        **job_resources(lambda wildcards: "fabric"),
    shell:
        "bash {input.launch:q} >> {log:q} 2>&1"
