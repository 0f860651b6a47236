"""
Renders what every job is started with, before anything is submitted; jobs read these files and never the config.
IN   the config; results/<run>.lock.json where something is fetched
OUT  results/<run>/stages/<stage>/{launch.sh,ds_config.json,stage.json,environment.json[,job.sbatch]}
     results/<run>/jobs/<job>/{launch.sh,job.json[,job.sbatch]};  results/<run>/plan.json
"""


localrules:
    render_stage,
    render_job,
    render_plan,


rule render_stage:
    input:
        LOCK,
    output:
        launch="results/{run}/stages/{stage}/launch.sh",
        deepspeed="results/{run}/stages/{stage}/ds_config.json",
        job="results/{run}/stages/{stage}/stage.json",
        nodes="results/{run}/stages/{stage}/environment.json",
        sbatch=sbatch_file("results/{run}/stages/{stage}"),
    log:
        "results/{run}/logs/render_stage/{stage}.log",
    params:
        key=lambda wildcards: render_key(PLAN, f"train-{wildcards.stage}"),
        config=CONFIG,
        folder=subpath(output.launch, parent=True),
    shell:
        "{LONGHAUL} render train-{wildcards.stage} {params.config:q} {params.folder:q} >> {log:q} 2>&1"


rule render_job:
    input:
        LOCK,
    output:
        launch="results/{run}/jobs/{job}/launch.sh",
        job="results/{run}/jobs/{job}/job.json",
        sbatch=sbatch_file("results/{run}/jobs/{job}"),
    log:
        "results/{run}/logs/render_job/{job}.log",
    params:
        key=lambda wildcards: render_key(PLAN, wildcards.job),
        config=CONFIG,
        folder=subpath(output.launch, parent=True),
    shell:
        "{LONGHAUL} render {wildcards.job} {params.config:q} {params.folder:q} >> {log:q} 2>&1"


rule render_plan:
    input:
        LOCK,
    output:
        plan="results/{run}/plan.json",
        config="results/{run}/config.yaml",
    log:
        "results/{run}/logs/render_plan.log",
    params:
        key=plan_key(PLAN),
        config=CONFIG,
    shell:
        "({LONGHAUL} plan {params.config:q} --out {output.plan:q} && cp {params.config:q} {output.config:q}) >> {log:q} 2>&1"
