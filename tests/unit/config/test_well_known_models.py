"""Sizes of the reference models are those of the published config.json files."""

from __future__ import annotations

import json
from pathlib import Path

from longhaul.config.well_known_models import REFERENCE_MODELS

OFFICIAL = json.loads((Path(__file__).parents[1] / "export" / "official_repositories.json").read_text())


def test_deepseek_r1_has_the_values_of_its_repository():
    config, published = REFERENCE_MODELS["DeepSeek-R1"], OFFICIAL["deepseek-ai/DeepSeek-R1"]["config"]
    assert {key: published[key] for key in config} == config
    assert config["max_position_embeddings"] == 163840
