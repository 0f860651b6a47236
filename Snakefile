"""The workflow is in workflow/Snakefile; this file lets `snakemake` find it from the top of the repository."""


include: "workflow/Snakefile"


# Snakemake drops the default target of an included file, and would have nothing to do.
workflow.default_target = "all"
