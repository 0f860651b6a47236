"""Parts that a job's processes need to run together: ranks, rendezvous, heartbeat, compiled ops, swap folders."""
