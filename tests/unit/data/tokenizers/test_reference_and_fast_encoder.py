"""Both encoders give the same ids and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.data.tokenizers.control_tokens import ControlTokens
from longhaul.data.tokenizers.reference_and_fast_encoder import (
    ControlTextEncoder,
    FastEncoder,
    ReferenceEncoder,
    read_settings,
)
from longhaul.data.tokenizers.token_rows import TokenRows, add_special_ids


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=8),
    st.lists(st.integers(0, 9), max_size=2),
    st.booleans(),
)
def test_special_ids_are_added_at_the_right_positions(rows: list[list[int]], prefix: list[int], has_suffix: bool):
    suffix = [3] if has_suffix else []
    flat = TokenRows(
        np.array([n for row in rows for n in row], np.uint32), np.array([len(row) for row in rows], np.int64)
    )
    rows_with_ids = add_special_ids(add_special_ids(flat, prefix, suffix), (), (), 5)
    expected = [[*prefix, *row, *suffix] for row in rows]
    expected = [row if row and row[-1] == 5 else [*row, 5] for row in expected]
    assert rows_with_ids.lengths.tolist() == [len(row) for row in expected]
    assert rows_with_ids.tokens.tolist() == [n for row in expected for n in row]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_encoders_give_the_same_masks(tokenizer_folder: Path, data: st.DataObject):
    folder = Path(TokenizerManifest.read(tokenizer_folder / "tokenizer.json").path)
    written = data.draw(st.text(min_size=1, max_size=60))
    start = data.draw(st.integers(0, len(written)))
    spans = [[(start, data.draw(st.integers(start, len(written))))]]
    reference = ReferenceEncoder(folder)
    fast = FastEncoder(folder, reference).encode_with_mask([written], spans)
    expected = reference.encode_with_mask([written], spans)
    assert fast[0].tokens.tolist() == expected[0].tokens.tolist() and fast[1].tolist() == expected[1].tolist()


def test_added_tokens_keep_their_ids_beside_the_text_of_a_control_token(tmp_path: Path):
    """A tokenizer that was trained with its special tokens has them in the model's vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    control_tokens = ControlTokens(read_settings(tmp_path).control_tokens)
    quotation = control_tokens.hide("<|end|>")
    encoder = ControlTextEncoder(tmp_path, control_tokens)
    rows, _ = encoder.encode_with_mask([control_tokens.exchange(f"{quotation}<think>a<|end|>")], [[]])
    quoted = [vocabulary[character] for character in "<|end|>"]
    assert rows.tokens.tolist() == [*quoted, 257, vocabulary["a"], 0]
