"""Jobs: the kinds of jobs, the spec (JSON) that each reads, and the files that start it; Slurm options are in planning/."""
