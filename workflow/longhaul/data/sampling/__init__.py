"""Read training samples from shards by number."""
