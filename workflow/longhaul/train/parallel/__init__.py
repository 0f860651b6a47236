"""How one copy of the model is spread over ranks, one module an axis; DeepSpeed sees smaller tensors and fewer data ranks.

Every axis works on the Hugging Face network itself: it replaces parameters by their local part (shards.py) and wraps the
few modules at whose edges ranks must talk.
"""
