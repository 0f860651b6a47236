"""Saving, finding, verifying and loading training checkpoints."""
