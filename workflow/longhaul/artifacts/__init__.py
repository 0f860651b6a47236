"""The small files that pass between jobs, and the rules for reading and writing them safely."""
