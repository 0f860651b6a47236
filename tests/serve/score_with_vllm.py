"""Runs in the environment of vLLM: python score_with_vllm.py FOLDER PROMPTS.json OUT.json [rotary-kernel].

PROMPTS.json holds [[token id]]. OUT.json gets, for each prompt, the log probabilities of its second token and of all later ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, prompts: Path, out: Path, has_rotary_kernel: bool) -> None:
    """Score the prompts with the model in `folder`, in fp32."""
    from vllm import LLM, SamplingParams

    # Of vLLM 0.32's CPU kernels, rotary_embedding is wrong for DeepSeek: it writes to views of wider rows as if they were
    # contiguous. vLLM's own PyTorch code of the same layer is used instead.
    compilation: Any = {"custom_ops": [] if has_rotary_kernel else ["-rotary_embedding"]}
    model = LLM(
        folder,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        compilation_config=compilation,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    rows: list[Any] = [{"prompt_token_ids": ids} for ids in json.loads(prompts.read_text())]
    found = []
    for answer in model.generate(rows, sampling):
        scored = zip(answer.prompt_token_ids or [], answer.prompt_logprobs or [], strict=True)
        found.append([entry[token].logprob for token, entry in scored if entry])
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:] == ["rotary-kernel"])
