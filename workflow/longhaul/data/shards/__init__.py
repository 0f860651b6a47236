"""Shards: divides sources into chunks, encodes them in worker processes, writes and reads Megatron .bin/.idx files."""
