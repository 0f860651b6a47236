"""Any config, site file, data or model folder is planned and rendered, or refused with a message. Nothing hangs or crashes."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from longhaul.config.load_config import load_config
from longhaul.data.check_inputs import check_inputs
from longhaul.data.readers.read_documents import read_documents
from longhaul.data.tokenizers.document_encoder import DocumentEncoder
from longhaul.errors import UserError
from longhaul.jobs.launch_files import render_run
from longhaul.planning import Plan, build_plan
from longhaul.report.plan_table import print_plan
from tests.support.any_input import CHAT_ROWS, Inputs, inputs
from tests.support.chat_families import FAMILIES, make_family_tokenizer
from tests.support.corpora import dataset

_CONTROL = {
    *map(chr, range(32)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
} - {"\n"}


def planned(path: Path) -> Plan | None:
    """Plan, print and render a run; None if it is refused."""
    try:
        plan = build_plan(load_config(path))
        check_inputs(plan)
        with contextlib.redirect_stdout(io.StringIO()):
            print_plan(plan)
        render_run(plan, path.parent)
    except UserError as error:
        assert_is_message(error)
        return None
    return plan


def assert_is_message(error: UserError) -> None:
    """The text is one short message for a terminal, with a remedy."""
    text = str(error)
    assert error.hint and len(text) < 20_000, text[:4000]
    assert not _CONTROL & set(text), f"control characters in {text!r}"


@given(drawn=inputs())
def test_any_run_is_planned_and_rendered_or_refused(drawn: Inputs):
    with tempfile.TemporaryDirectory() as folder:
        planned(drawn.write(Path(folder) / "run"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DocumentEncoder]:
    folder = tmp_path_factory.mktemp("families")
    tokenizers = {name: make_family_tokenizer(name, folder / name) for name in FAMILIES}
    return {name: DocumentEncoder(found, dataset("chat"), "tokenizers") for name, found in tokenizers.items()}


@given(row=CHAT_ROWS)
def test_any_chat_row_is_encoded_or_refused(encoders: dict[str, DocumentEncoder], row: dict[str, Any]):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.jsonl"
        file.write_text(json.dumps(row))
        try:
            documents = list(read_documents([str(file)], dataset("chat")))
        except UserError as error:
            assert_is_message(error)
            return
        for encoder in encoders.values():
            encoded = encoder.encode(documents)
            assert len(encoded.lengths) + len(encoded.left_out) == 1
            for error in encoded.left_out:
                assert_is_message(error)
            if len(encoded.lengths):
                assert encoded.mask is not None and np.any(encoded.mask[1:])
