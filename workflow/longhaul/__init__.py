"""longhaul: from raw text to a verified Hugging Face model, over many nodes and many days."""

__version__ = "0.2.0"
