"""Declarations of the kinds of jobs: what each reads, writes, and asks Slurm for; one module per kind or few related kinds."""
