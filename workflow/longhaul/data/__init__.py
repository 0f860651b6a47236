"""Read data files, encode documents, filter them, write token shards, and read training samples."""
