"""Training of one stage: plain `deepspeed.initialize` around a Hugging Face causal language model.

loop.py gives the order of events, trainer.py one step, one validation and one save; the other modules hold the parts.
"""
