"""Makes imports of a job's process cheap: no garbage collection, no MLflow."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import modules without garbage collection and without MLflow, for the length of a `with` block.

    Modules are half a million objects and no garbage. The collector takes a fifth of the import time to look through them
    again and again, and each full collection of the training would look through them once more, so they are frozen.
    DeepSpeed's autotuner, which nothing here uses, imports MLflow where it is installed; trackers import MLflow on rank 0
    where a config enables it.
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if hidden:
            del sys.modules["mlflow"]
