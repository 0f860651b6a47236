"""Loads a whole `torch.save` file into memory for DeepSpeed's engine when a stage resumes; only listed classes are allowed.

torch's restricted unpickler builds tensors, containers, numbers and the listed classes. It refuses a file that names anything
else. torch_archive.py reads the same files lazily; it replaces what it does not know.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longhaul.errors import UserError


def load_plain_data(
    path: str | Path, classes: Sequence[type] = (), map_location: torch.serialization.MAP_LOCATION = None
) -> Any:
    """Return the object in a `torch.save` file.

    classes: classes of DeepSpeed whose objects the file may hold; their objects are filled without a call of their methods

    Raises:
        UserError: the file is missing, damaged, or names a class or function that is not allowed.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "the checkpoint is incomplete: use another checkpoint") from None
    except (
        pickle.UnpicklingError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        EOFError,
    ) as error:
        raise UserError(
            f"{path} is not read, because it holds more than tensors and plain data: {_reason(error)}",
            "the file was altered, and may hold code: find out who wrote it. Then move the checkpoint's folder away and run the "
            "same command again: the checkpoint before it is used",
        ) from None


def _reason(error: Exception) -> str:
    """Return what was refused: the error that torch wraps, without its advice to switch the protection off."""
    wrapped = error.__context__ or error
    return str(wrapped).split(" Please use ")[0].strip().partition("\n")[0] or type(wrapped).__name__
