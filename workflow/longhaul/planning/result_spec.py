"""The result spec: what a stage's weights depend on."""

from __future__ import annotations

from typing import Any

from longhaul.config.load import LoadedConfig
from longhaul.config.run_config import Stage


def result_spec(loaded: LoadedConfig, stage: Stage, steps: int) -> dict[str, Any]:
    """What a stage's weights depend on, beside its data and starting checkpoint, whose hashes the job adds.

    Nodes, layout, ZeRO stage, micro batch and the like are not in it: they change how long the same result takes. What is
    done at a bad step is not either: a stage that failed at one goes on from its checkpoint under another policy.
    Written as the config states it, never from the lock: a spec must not change when fetch has run.
    """
    model = loaded.config.model
    return {
        "model": model.config_dict() or _pretrained_identity(loaded),
        "seed": loaded.config.seed,
        "kind": stage.kind,
        "dataset": stage.dataset,
        "from": stage.start_from.model_dump() if stage.start_from else None,
        "steps": steps,
        "restart": stage.restart,
        "global_batch_size": stage.global_batch_size,
        "sequence_length": stage.sequence_length,
        "optimizer": stage.optimizer.model_dump(mode="json"),
        "schedule": stage.schedule.model_dump(mode="json"),
        "precision": stage.precision,
        "fp16": stage.fp16.model_dump(mode="json") if stage.precision == "fp16" else None,
        "router_bias_update_rate": stage.router_bias_update_rate,
        "sequence_aux_loss_coef": stage.sequence_aux_loss_coef,
        "communication": stage.communication.model_dump(mode="json"),
    }


def _pretrained_identity(loaded: LoadedConfig) -> dict[str, Any]:
    """A hub model by id and revision; a local one by its files' names and sizes (weights are not hashed at every parse)."""
    pretrained = loaded.config.model.pretrained
    if pretrained is None or pretrained.hub:
        return pretrained.model_dump(mode="json") if pretrained else {}
    folder = loaded.resolve("model.pretrained.path", pretrained.path or "")
    return {"path": str(folder), "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}}
