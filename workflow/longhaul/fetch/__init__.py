"""Download the models, tokenizers and datasets that a config names, and pin their revisions."""
