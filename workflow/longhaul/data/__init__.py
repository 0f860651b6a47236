"""Data: reads files, encodes documents as tokens, filters them, writes shards, and gives training samples."""
