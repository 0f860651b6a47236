"""
longhaul: raw text -> tokenizer -> token shards -> checks -> training stages -> proved Hugging Face models -> report.

The config is read by workflow/rules/common.smk: exactly one file, --configfile or config/config.yaml.
"""


include: "workflow/rules/common.smk"
include: "workflow/rules/fetch.smk"
include: "workflow/rules/render.smk"
include: "workflow/rules/environment.smk"
include: "workflow/rules/fabric.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/convert.smk"
include: "workflow/rules/report.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        f"results/{PLAN.run}/report.html",
        finished_stages(),
        exports(),


onstart:
    start_run()


onsuccess:
    call_off()
