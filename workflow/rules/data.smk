"""
Makes the tokenizer and, for each dataset that a stage trains on, token shards.
IN   the datasets' own files, or fetch's lock
OUT  results/<run>/tokenizer.json;  results/<run>/data/<dataset>.json   (shards beside it, in folders named by their hash)

Where several jobs share a dataset's units (data_jobs), survey and encode go before tokenize, which then finds the units.
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


rule survey:
    input:
        LOCK,
        lambda wildcards: repository_sources(PLAN, wildcards.dataset),
        tokenizer="results/{run}/tokenizer.json",
    output:
        temp("results/{run}/data/{dataset}.survey.json"),
    log:
        "results/{run}/logs/survey/{dataset}.log",
    benchmark:
        "results/{run}/benchmarks/survey/{dataset}.tsv"
    conda:
        "../../envs/job.yaml"
    threads: job_threads(lambda wildcards: f"survey-{wildcards.dataset}")
    resources:
        **job_resources(lambda wildcards: f"survey-{wildcards.dataset}"),
    params:
        spec=lambda wildcards: spec_key(PLAN, f"survey-{wildcards.dataset}"),
        launch=lambda wildcards: launch_of(f"survey-{wildcards.dataset}"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"


rule encode:
    input:
        survey="results/{run}/data/{dataset}.survey.json",
        tokenizer="results/{run}/tokenizer.json",
    output:
        temp("results/{run}/data/{dataset}.encoded-{share}-of-{shares}.json"),
    log:
        "results/{run}/logs/encode/{dataset}-{share}-of-{shares}.log",
    benchmark:
        "results/{run}/benchmarks/encode/{dataset}-{share}-of-{shares}.tsv"
    conda:
        "../../envs/job.yaml"
    threads: job_threads(encode_job)
    resources:
        **job_resources(encode_job),
    params:
        spec=lambda wildcards: spec_key(PLAN, encode_job(wildcards)),
        launch=lambda wildcards: launch_of(encode_job(wildcards)),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"


rule tokenize:
    input:
        LOCK,
        lambda wildcards: repository_sources(PLAN, wildcards.dataset),
        lambda wildcards: order_only(shared_artifacts(PLAN, wildcards.dataset)),
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
