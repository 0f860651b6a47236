"""What runs on an allocation's first node, around a job: launch.sh becomes it. The only part that talks to Slurm.

supervisor tells the story; slurm_client asks Slurm; deadline keeps the end of the allocation where trainers can read it.
"""
