"""Runs in the environment of any release of transformers: python score_with_transformers.py PROMPTS.json OUT.json FOLDER…

PROMPTS.json holds [[token id]]. OUT.json gets, for each folder, the log probabilities of each prompt's second token and of all
later ones, and what the tokenizer makes of a text and of a chat.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TEXT = "Wörter, 3.14 and\n\tmore<pad> <s>"
CHAT = [
    {"role": "user", "content": "Wörter?"},
    {"role": "assistant", "content": "3.14"},
    {"role": "user", "content": "More"},
]


def main(prompts: Path, out: Path, folders: list[str]) -> None:
    """Score the prompts with the export in each folder."""
    import torch
    import transformers

    dtype = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
    found: dict[str, Any] = {"version": transformers.__version__}
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **{dtype: "auto"}).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        scores = []
        for ids in json.loads(prompts.read_text()):
            ids_1T = torch.tensor([ids])
            with torch.no_grad():
                log_probabilities_TV = model(ids_1T).logits[0, :-1].float().log_softmax(-1)
            scores.append(log_probabilities_TV.gather(1, ids_1T[0, 1:, None])[:, 0].tolist())
        chat = tokenizer.chat_template and tokenizer.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(TEXT)["input_ids"]
        found[folder] = {"scores": scores, "dtype": str(model.dtype), "ids": ids, "chat": chat}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
