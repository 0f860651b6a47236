"""The processes of a job: rank, rendezvous, heartbeat, compiled ops, swap folders."""
