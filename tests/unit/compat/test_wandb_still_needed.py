"""compat/wandb.py is still needed. A failing test means that W&B has changed or offers a public way."""

from __future__ import annotations

import wandb

from longhaul.compat.wandb import FLUSH_INTERVAL_VARIABLE, is_deleted_run


def test_the_flush_interval_is_only_an_unstable_setting():
    settings = wandb.Settings()
    assert FLUSH_INTERVAL_VARIABLE == "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL"
    assert settings.x_transaction_log_flush_interval == 15.0
    assert not [name for name in type(settings).model_fields if "flush" in name and not name.startswith("x_")]


def test_a_deleted_run_has_no_error_class_of_its_own():
    assert not [name for name in dir(wandb.errors) if "deleted" in name.lower()]
    assert is_deleted_run(
        wandb.errors.CommError("run me/small/run was previously created and deleted; try a new run name")
    )
    assert not is_deleted_run(wandb.errors.CommError("timeout"))
