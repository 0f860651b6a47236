"""Token ids to shards on disk."""
