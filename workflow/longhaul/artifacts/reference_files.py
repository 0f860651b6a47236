"""Names of the reference values' files in reference/ of a checkpoint; train/write_reference_values.py says what they hold."""

from __future__ import annotations

TENSORS = "tensors.json"
LOGITS = "logits.safetensors"
COMPUTED_WITH = "logits.json"
PROMPTS = "prompts.json"
REFERENCE_FILES = (TENSORS, LOGITS, COMPUTED_WITH, PROMPTS)
