"""The stress corpus contains every character, and both encoders give the same ids for it."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

from transformers import AutoTokenizer

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.data.tokenizers.reference_and_fast_encoder import FastEncoder, ReferenceEncoder
from longhaul.data.tokenizers.stress_corpus import stress_texts


def test_the_fast_encoder_gives_autotokenizers_ids(tokenizer_folder: Path):
    folder = Path(TokenizerManifest.read(tokenizer_folder / "tokenizer.json").path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = stress_texts(["<|im_start|>", "<|endoftext|>"])
    rows = FastEncoder(folder, ReferenceEncoder(folder)).encode(texts)
    expected = tokenizer(texts)["input_ids"]
    assert rows.lengths.tolist() == [len(row) for row in expected]
    assert rows.tokens.tolist() == [number for row in expected for number in row]
    assert sum(len(part.encode()) for part in texts) > 1_000_000


def test_every_assigned_character_occurs_alone():
    texts = stress_texts([])
    assigned = {
        chr(code) for code in range(sys.maxunicode) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    }
    alone = {word for part in texts for word in part.split(" ") if len(word) == 1}
    assert len(assigned) > 140_000 and assigned - alone <= {" "}
