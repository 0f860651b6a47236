"""Export: writes a checkpoint as a Hugging Face folder and verifies it against the trainer's reference values."""
