"""
Trains the first stage for a few steps on one number of nodes, and compares its speed with the limits of `scale_test`.
IN   the first stage's dataset; the passed checks; the report on the next smaller number of nodes
OUT  results/<run>/scale_test/<nodes>.json   (only if every limit is met; else <nodes>.json.failed.json lists the problems)
"""


rule scale_test:
    input:
        data=PLAN.paths.manifest(PLAN.stages[0].stage.dataset),
        fabric=ancient("results/{run}/fabric.json"),
        fewer_nodes=fewer_nodes,
    output:
        "results/{run}/scale_test/{nodes}.json",
    log:
        "results/{run}/logs/scale_test/{nodes}.log",
    benchmark:
        "results/{run}/benchmarks/scale_test/{nodes}.tsv"
    threads: JOBS.threads("scale_test")
    resources:
        **JOBS.resources("scale_test"),
    params:
        **JOBS.params("scale_test"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
