"""Seeds dropout and other random numbers of a step by seed, step and rank, and by nothing else.

So no state of a generator is saved: a resumed attempt, a repeated run and a run that was killed before its first save all draw
the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def seed_random_numbers(seed: int, step: int, rank: int) -> None:
    """Begin this rank's random stream of the step after `step` steps, on the CPU and on every GPU of this process."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
