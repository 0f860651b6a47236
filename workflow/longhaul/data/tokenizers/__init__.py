"""Build tokenizers and encode documents as token ids."""
