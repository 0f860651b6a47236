"""Job kinds, job specs, Slurm requests of jobs, and the files that start a job."""
