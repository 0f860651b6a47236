"""
Writes one self-contained HTML page about the run.
IN   every artifact of the run
OUT  results/<run>/report.html
"""


localrules:
    report,


rule report:
    input:
        plan="results/{run}/plan.json",
        environment="results/{run}/environment.json",
        fabric="results/{run}/fabric.json",
        tokenizer="results/{run}/tokenizer.json",
        data=expand(
            "results/{{run}}/data/{dataset}.json", dataset=sorted(PLAN.used_datasets)
        ),
        stages=finished_stages(),
        exports=exports(),
        evaluations=evaluations(),
        serve_checks=serve_checks(),
    output:
        "results/{run}/report.html",
    log:
        "results/{run}/logs/report.log",
    params:
        folder=subpath(output[0], parent=True),
    shell:
        "longhaul report {params.folder:q} --out {output:q} >> {log:q} 2>&1"
