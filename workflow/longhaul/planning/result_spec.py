"""Decides what makes a stage train again: the config keys on which its weights depend."""

from __future__ import annotations

from longhaul.config.load_config import LoadedConfig
from longhaul.config.stage_config import Stage


def result_spec(loaded: LoadedConfig, stage: Stage, steps: int) -> dict[str, object]:
    """Return everything that a stage's weights depend on, except its data and starting checkpoint; the job adds their hashes.

    Nodes, parallel layout, ZeRO stage, micro batch size and similar keys are left out: they change only how long the training
    takes. The policy for bad steps is left out, too: a stage that failed at a bad step resumes from its checkpoint under a
    new policy.
    All values come from the config and none from the lock file, because the spec must not change when fetch has run.
    """
    model = loaded.config.model
    return {
        "model": model.config_dict() or _pretrained_spec(loaded),
        "seed": loaded.config.seed,
        "kind": stage.kind,
        "dataset": stage.dataset,
        "from": stage.start_from.model_dump() if stage.start_from else None,
        "steps": steps,
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
        "communication": stage.communication.model_dump(mode="json"),
    }


def _pretrained_spec(loaded: LoadedConfig) -> dict[str, object]:
    """Return id and revision of a Hub model, or names and sizes of a local model's files.

    Weights are not hashed: each parsing of the workflow would have to read them.
    """
    pretrained = loaded.config.model.pretrained
    if pretrained is None or pretrained.hub:
        return pretrained.model_dump(mode="json") if pretrained else {}
    folder = loaded.resolve("model.pretrained.path", pretrained.path or "")
    return {"path": str(folder), "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}}
