"""
Writes the plan, and what each stage's weights depend on.
IN   the config
OUT  results/<run>/plan.json, config.yaml, site.yaml (of a user's own site file)
     results/<run>/stages/<stage>/result_spec.json

The files that jobs are started with (launch.sh, job.sbatch, job specs, DeepSpeed configs) are no outputs of a rule. The main
process writes them when it starts and after a fetch. As outputs they would hide other causes: Snakemake does not look for
further reasons to run a job behind a job that it runs again.
"""


localrules:
    render,
    render_result_spec,


rule render:
    input:
        LOCK,
    # Updated in place: the main process has written the plan, and longhaul status reads it at any moment.
    output:
        plan=update("results/{run}/plan.json"),
        config=update("results/{run}/config.yaml"),
    log:
        "results/{run}/logs/render.log",
    params:
        key=plan_key(PLAN),
        config=CONFIG,
    shell:
        "(longhaul plan {params.config:q} --out {output.plan:q} && longhaul job copy-config {params.config:q} {output.config:q}) "
        ">> {log:q} 2>&1"


# A file and not a parameter of train: while a check runs again, Snakemake does not compare the parameters of the jobs
# behind it, even if those take the check as ancient(). It never misses an input that is made again.
rule render_result_spec:
    output:
        "results/{run}/stages/{stage}/result_spec.json",
    log:
        "results/{run}/logs/render_result_spec/{stage}.log",
    params:
        text=lambda wildcards: canonical_json(PLAN.stage(wildcards.stage).spec),
    shell:
        "echo {params.text:q} > {output:q} 2> {log:q}"
