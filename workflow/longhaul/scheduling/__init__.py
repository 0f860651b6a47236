"""Slurm and recovery: submission, supervision, restart, requeue and retry of jobs; the only folder that calls Slurm.

In the main Snakemake process: request_at_submission, retry_policy and check_disk_space. On the first node of an
allocation: supervisor, which launch.sh becomes. slurm_client serves both.
"""
