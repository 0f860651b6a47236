"""Trains one stage: plain deepspeed.initialize on a Hugging Face causal language model.

loop tells the story; the other modules are its chapters.
"""
