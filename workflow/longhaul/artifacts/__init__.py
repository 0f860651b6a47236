"""Small JSON files that pass between jobs, written atomically: their schemas, job state, leases."""
