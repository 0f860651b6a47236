"""Both encoders give the same ids and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.data.tokenizers.reference_and_fast_encoder import FastEncoder, ReferenceEncoder
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
