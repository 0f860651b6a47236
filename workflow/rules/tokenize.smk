"""
Makes the tokenizer and the token shards of each dataset, counts what sft stages keep, and says which outputs are temporary.
IN   the datasets' files, or the lock that fetch wrote
OUT  results/<run>/tokenizer.json;  results/<run>/data/<dataset>.json   (shards are beside it, in folders named by their hash);
     results/<run>/data/<dataset>.kept.json

Where several jobs share a dataset's chunks (config key data_jobs), index_sources and encode run before tokenize.
"""


rule tokenizer:
    input:
        LOCK,
        tokenizer_text,
    output:
        "results/{run}/tokenizer.json",
    log:
        "results/{run}/logs/tokenizer.log",
    benchmark:
        "results/{run}/benchmarks/tokenizer.tsv"
    threads: JOBS.threads("tokenizer")
    resources:
        **JOBS.resources("tokenizer"),
    params:
        **JOBS.params("tokenizer"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"


rule index_sources:
    input:
        LOCK,
        lambda wildcards: PLAN.rule_inputs(wildcards.dataset),
        tokenizer="results/{run}/tokenizer.json",
    output:
        temp("results/{run}/data/{dataset}.sources.json"),
    log:
        "results/{run}/logs/index_sources/{dataset}.log",
    benchmark:
        "results/{run}/benchmarks/index_sources/{dataset}.tsv"
    threads: JOBS.threads("index_sources")
    resources:
        **JOBS.resources("index_sources"),
    params:
        **JOBS.params("index_sources"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"


rule encode:
    input:
        sources="results/{run}/data/{dataset}.sources.json",
        tokenizer="results/{run}/tokenizer.json",
    output:
        temp("results/{run}/data/{dataset}.encoded-{partition}-of-{partitions}.json"),
    log:
        "results/{run}/logs/encode/{dataset}-{partition}-of-{partitions}.log",
    benchmark:
        "results/{run}/benchmarks/encode/{dataset}-{partition}-of-{partitions}.tsv"
    threads: JOBS.threads("encode")
    resources:
        **JOBS.resources("encode"),
    params:
        **JOBS.params("encode"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"


rule tokenize:
    input:
        LOCK,
        lambda wildcards: PLAN.rule_inputs(wildcards.dataset),
        lambda wildcards: order_only(shared_artifacts(PLAN, wildcards.dataset)),
        tokenizer="results/{run}/tokenizer.json",
    output:
        "results/{run}/data/{dataset}.json",
    log:
        "results/{run}/logs/tokenize/{dataset}.log",
    benchmark:
        "results/{run}/benchmarks/tokenize/{dataset}.tsv"
    threads: JOBS.threads("tokenize")
    resources:
        **JOBS.resources("tokenize"),
    params:
        **JOBS.params("tokenize"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"


# Not in the manifest: then another sequence_length would train every stage on these chats again.
rule count_chats:
    input:
        "results/{run}/data/{dataset}.json",
    output:
        "results/{run}/data/{dataset}.kept.json",
    log:
        "results/{run}/logs/count_chats/{dataset}.log",
    benchmark:
        "results/{run}/benchmarks/count_chats/{dataset}.tsv"
    threads: JOBS.threads("count_chats")
    resources:
        **JOBS.resources("count_chats"),
    params:
        **JOBS.params("count_chats"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
