"""Tokenizers: builds the run's tokenizer, renders chats, encodes documents with loss masks."""
