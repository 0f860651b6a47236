"""Submission, supervision and restart of jobs: the only part of the package that talks to Slurm.

In the main Snakemake process: resource_requests, retry_policy and disk_space. On the first node of an allocation: supervisor,
which launch.sh becomes. slurm_client serves both.
"""
