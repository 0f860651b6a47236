"""Fetch: downloads the models, tokenizers and datasets that a config names on the hub, and pins their revisions."""
