"""Training of one stage: plain `deepspeed.initialize` around a Hugging Face causal language model.

train_stage.py gives the order of events, trainer.py one step, one validation and one save; other modules hold the parts.
"""
