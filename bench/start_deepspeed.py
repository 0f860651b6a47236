"""The start of a bare DeepSpeed training, for bench/start.py. Arguments: time.time() of the start, and a training job's spec.

It does what a short script of DeepSpeed's documentation does: a model of transformers with its own initial weights,
deepspeed.initialize, and one step over random tokens.
"""

# ruff: noqa: E402  # the imports are a part of what is measured
from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

BEGAN_S = float(sys.argv[1])

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    """Run the phases and print their seconds."""
    job = json.loads(Path(sys.argv[2]).read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ends = {"imports": time.time()}
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    ends["rendezvous"] = time.time()
    config = AutoConfig.for_model(**job["model"], use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    ends["model"] = time.time()
    settings = json.loads(Path(job["deepspeed"]).read_text())
    engine: Any = deepspeed.initialize(model=model, config=settings)[0]
    ends["engine"] = time.time()
    shape = (job["stage"]["micro_batch_size"], job["stage"]["sequence_length"])
    ids = torch.randint(job["model"]["vocab_size"], shape, device=device)
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    ends["first_step"] = time.time()
    begins = [BEGAN_S, *ends.values()]
    seconds = {phase: end_s - begin_s for (phase, end_s), begin_s in zip(ends.items(), begins, strict=False)}
    print("\nRESULT " + json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
