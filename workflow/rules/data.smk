"""
Makes the tokenizer and, for each dataset that a stage trains on, token shards.
IN   the datasets' own files, or fetch's lock
OUT  results/<run>/tokenizer.json;  results/<run>/data/<dataset>.json   (shards beside it, in a folder named by their hash)
"""


rule tokenizer:
    input:
        LOCK,
        text_of_tokenizer,
    output:
        "results/{run}/tokenizer.json",
    log:
        "results/{run}/logs/tokenizer.log",
    benchmark:
        "results/{run}/benchmarks/tokenizer.tsv"
    conda:
        "../../envs/job.yaml"
    threads: job_threads(lambda wildcards: "tokenizer")
    resources:
        **job_resources(lambda wildcards: "tokenizer"),
    params:
        spec=spec_key(PLAN, "tokenizer"),
        launch=launch_of("tokenizer"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"


rule tokenize:
    input:
        LOCK,
        lambda wildcards: repository_sources(PLAN, wildcards.dataset),
        tokenizer="results/{run}/tokenizer.json",
    output:
        "results/{run}/data/{dataset}.json",
    log:
        "results/{run}/logs/tokenize/{dataset}.log",
    benchmark:
        "results/{run}/benchmarks/tokenize/{dataset}.tsv"
    conda:
        "../../envs/job.yaml"
    threads: job_threads(lambda wildcards: f"tokenize-{wildcards.dataset}")
    resources:
        **job_resources(lambda wildcards: f"tokenize-{wildcards.dataset}"),
    params:
        spec=lambda wildcards: spec_key(PLAN, f"tokenize-{wildcards.dataset}"),
        launch=lambda wildcards: launch_of(f"tokenize-{wildcards.dataset}"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
