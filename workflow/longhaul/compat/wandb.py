"""Private parts of W&B: how often offline rows are flushed, and how a run that was deleted on the server is recognised. Written
for wandb 0.31.
"""

from __future__ import annotations

FLUSH_INTERVAL_VARIABLE = "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL"
"""Environment variable of the setting x_transaction_log_flush_interval: seconds until rows reach the offline file. Settings that
begin with x_ are not stable. No public setting limits how many rows a killed process loses."""


def is_deleted_run(error: Exception) -> bool:
    """Return whether wandb.init failed because the run was deleted on its server.

    CommError has no code for that; the server's message is the only sign.
    """
    return "previously created and deleted" in str(error)
