"""Runtime of a job's processes: ranks, rendezvous, heartbeat, GPU and core binding, compiled ops, swap folders."""
