"""Checkpoints: saving, finding, verifying, loading, resharding and removing them."""
