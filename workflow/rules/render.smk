"""
Writes the plan, and what each stage's weights depend on. What jobs are started with (launch.sh, job.sbatch, DeepSpeed
configs, payloads) is rendered by the main process when it starts and after a fetch, before anything is submitted: were
those files outputs that a changed one makes anew, Snakemake would look no further for causes behind them.
IN   the config
OUT  results/<run>/plan.json, config.yaml;  results/<run>/stages/<stage>/spec.json
"""


localrules:
    render,
    render_spec,


rule render:
    input:
        LOCK,
    output:
        plan="results/{run}/plan.json",
        config="results/{run}/config.yaml",
    log:
        "results/{run}/logs/render.log",
    conda:
        "../../envs/controller.yaml"
    params:
        key=plan_key(PLAN),
        config=CONFIG,
    shell:
        "(longhaul plan {params.config:q} --out {output.plan:q} && cp {params.config:q} {output.config:q}) >> {log:q} 2>&1"


# A file and not a parameter of train_stage: while a check runs anew, Snakemake does not compare the parameters of what
# comes after it, even if that takes the check as ancient; an input that is made anew it never misses.
rule render_spec:
    output:
        "results/{run}/stages/{stage}/spec.json",
    log:
        "results/{run}/logs/render_spec/{stage}.log",
    conda:
        "../../envs/controller.yaml"
    params:
        spec=lambda wildcards: spec_key(PLAN, f"train-{wildcards.stage}"),
        text=lambda wildcards: canonical_json(PLAN.stage(wildcards.stage).spec),
    shell:
        "echo {params.text:q} > {output:q} 2> {log:q}"
