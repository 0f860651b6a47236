"""Saving, finding, verifying, loading and removing training checkpoints."""
