"""Environment variables that keep Hugging Face libraries offline in jobs: HF_HUB_OFFLINE and others."""

from __future__ import annotations

# Without them a library that tries the network hangs until a time-out.
OFFLINE_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
