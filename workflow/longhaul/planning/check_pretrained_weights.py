"""Compares the safetensors headers of a pretrained model with its config, before a job waits in the queue."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.hub_tensors import TWO_FILES_HINT, WRONG_WEIGHTS_HINT, check_names, check_shape, hub_tensors
from longhaul.config.load_config import LoadedConfig
from longhaul.config.pretrained_format import mtp_prefixes
from longhaul.config.safetensors_header import safetensors_header
from longhaul.errors import UserError
from longhaul.planning.check_files_exist import read_model_folder

_FP8_SCALE = "_scale_inv"
_MOST_MISSING = 100_000


def check_pretrained_folder(loaded: LoadedConfig) -> None:
    """Check the folder that the config names, if it names one. `longhaul fetch` checks a model of the hub."""
    pretrained = loaded.config.model.pretrained
    if pretrained and pretrained.path:
        folder = loaded.resolve("model.pretrained.path", pretrained.path)
        check_pretrained_weights(folder, read_model_folder(folder, "model.pretrained.path"))


def check_pretrained_weights(folder: Path, config: HuggingFaceConfig) -> None:
    """Raise UserError unless the folder holds the tensors of its config.json, and no others.

    config: the folder's config.json, whose sizes and format have been checked. Factors of FP8 matrices are not compared.
    """
    stored = _stored_shapes(folder, mtp_prefixes(config))
    if config.get("quantization_config"):
        stored = {name: shape for name, shape in stored.items() if not name.endswith(_FP8_SCALE)}
    # Not all of them where a config.json claims far more than there are: it may claim billions.
    expected = dict(islice(hub_tensors(config), len(stored) + _MOST_MISSING))
    check_names(folder, stored, set(expected), bool(config.get("tie_word_embeddings")))
    for name, shape in expected.items():
        check_shape(folder, name, stored[name], shape, config["vocab_size"])


def _stored_shapes(folder: Path, left_out: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the folder's files, without those of multi-token prediction."""
    stored: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, _ = safetensors_header(path)
        for name, entry in header.items():
            if name == "__metadata__" or name.startswith(left_out):
                continue
            if name in stored:
                raise UserError(f"{folder}: {name} is in two files, the second is {path.name}", TWO_FILES_HINT)
            stored[name] = _shape(path, name, entry)
    return stored


def _shape(path: Path, name: str, entry: object) -> tuple[int, ...]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        raise UserError(f"{path} has no valid safetensors header: {name} has no shape", WRONG_WEIGHTS_HINT)
    return tuple(shape)
