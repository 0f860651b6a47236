"""
Exports a stage's checkpoint as a Hugging Face folder and verifies it: every tensor, the logits, no missing key.
IN   results/<run>/stages/<stage>/checkpoint.json;  results/<run>/tokenizer.json
OUT  results/<run>/export/<stage>.json   (the folders are in export/<stage>/, and `latest` names the newest)
"""


rule export:
    input:
        checkpoint="results/{run}/stages/{stage}/checkpoint.json",
        tokenizer="results/{run}/tokenizer.json",
    output:
        "results/{run}/export/{stage}.json",
    log:
        "results/{run}/logs/export/{stage}.log",
    benchmark:
        "results/{run}/benchmarks/export/{stage}.tsv"
    threads: JOBS.threads("export")
    resources:
        **JOBS.resources("export"),
    params:
        **JOBS.params("export"),
    shell:
        "bash {params.launch:q} >> {log:q} 2>&1"
