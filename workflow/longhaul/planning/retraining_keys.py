"""Decides what makes a stage train again: the config keys on which its weights depend."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cache
from pathlib import Path

from longhaul.config.load_config import LoadedConfig
from longhaul.config.stage_config import Stage

_BLOCK_BYTES = 65_536


def result_spec(loaded: LoadedConfig, stage: Stage, steps: int | None) -> dict[str, object]:
    """Return everything that a stage's weights depend on, except its data and starting checkpoint; the job adds their hashes.

    Nodes, parallel layout, ZeRO stage, micro batch size and similar keys are left out: they change only how long the training
    takes. The policy for bad steps is left out, too: a stage that failed at a bad step resumes from its checkpoint under a
    new policy.
    A length in epochs stays one: with the data, whose hash the job adds, it determines the steps.
    All values come from the config and none from the lock file, because the spec must not change when fetch has run.
    """
    model = loaded.config.model
    return {
        "model": model.config_dict() or _pretrained_spec(loaded),
        "seed": loaded.config.seed,
        "kind": stage.kind,
        "dataset": stage.dataset,
        "from": stage.start_from.model_dump() if stage.start_from else None,
        **({"epochs": stage.epochs} if stage.epochs else {"steps": steps}),
        "restart": stage.restart,
        "global_batch_size": stage.global_batch_size,
        "sequence_length": stage.sequence_length,
        # Left out where it is the default, so that weights of releases without the key stay valid.
        **({"truncate": stage.truncate} if stage.truncate != "right" else {}),
        "optimizer": stage.optimizer.model_dump(mode="json"),
        "schedule": stage.schedule.model_dump(mode="json"),
        "precision": stage.precision,
        "fp16": stage.fp16.model_dump(mode="json") if stage.precision == "fp16" else None,
        "router_bias_update_rate": stage.router_bias_update_rate,
        "sequence_aux_loss_coef": stage.sequence_aux_loss_coef,
        "compile": stage.compile,
        **({"deterministic": True} if stage.deterministic else {}),
        "communication": stage.communication.model_dump(mode="json"),
    }


def _pretrained_spec(loaded: LoadedConfig) -> dict[str, object]:
    """Return id and revision of a Hub model, or names, sizes and fingerprints of a local model's files.

    Weights are not hashed as a whole: each parsing of the workflow would have to read them.
    """
    pretrained = loaded.config.model.pretrained
    if pretrained is None or pretrained.hub:
        return pretrained.model_dump(mode="json") if pretrained else {}
    folder = loaded.resolve("model.pretrained.path", pretrained.path or "")
    return {
        "path": str(folder),
        "files": {path.name: _file_facts(path) for path in sorted(folder.iterdir()) if path.is_file()},
    }


def _file_facts(path: Path) -> list[int | str]:
    found = path.stat()
    return [found.st_size, _fingerprint(path, found.st_size, found.st_mtime_ns)]


@cache
def _fingerprint(path: Path, size: int, _modified_ns: int) -> str:
    """Return a hash of a file's first, middle and last block. Weights of two trainings differ nearly everywhere.

    An unreadable file, which the weights cannot come from, has the hash of an empty one.
    """
    blocks = hashlib.sha256()
    with suppress(PermissionError), path.open("rb") as stream:
        for start in (0, max(0, (size - _BLOCK_BYTES) // 2), max(0, size - _BLOCK_BYTES)):
            stream.seek(start)
            blocks.update(stream.read(_BLOCK_BYTES))
    return blocks.hexdigest()[:16]
