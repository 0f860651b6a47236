"""Training samples by number."""
