"""Files that pass between jobs below results/: paths, JSON fields, atomic writing, hashes, leases, job state, quarantine."""
