"""Which encoder a dataset gets: the fast one if it gives the reference's ids for hard texts and for a sample of the corpus.

The reference takes a second for them. `hard_ids` needs nothing else, so that processes can be at it while the fast encoder
is loaded, which takes as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from longhaul.data.tokenizers.encoders import (
    Fast,
    Reference,
    Rows,
    first_difference,
    open_fast,
    open_reference,
    settings_of,
)
from longhaul.data.tokenizers.stress_corpus import hard_texts


class Choice(NamedTuple):
    """The encoder of a dataset by name, and why it is not the fast one ("" if it is)."""

    name: str
    reason: str


def load_reference(folder: Path) -> None:
    """And the hard texts, where they are needed; for the processes that are forked later, too."""
    open_reference(folder).load()
    _hard_texts(folder)


def load_fast(folder: Path) -> None:
    """As load_reference, where the fast encoder is a candidate. Whoever opens it later finds what it raises."""
    if settings_of(folder).unfit:
        return
    try:
        open_fast(folder).encode(["a"])  # its first batch imports awkward and makes tables
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a tokenizer at which gigatoken's Rust half panics is left to the reference
        return


def hard_ids(folder: Path, parts: int = 1, each: Callable[..., Iterable[Rows]] = map) -> Iterable[Rows]:
    """The reference's ids of the hard texts, in as many parts, by `each`: those of a pool, or this process when asked."""
    return each(_hard_ids, repeat(folder), range(parts), repeat(parts))


def _hard_ids(folder: Path, part: int, parts: int) -> Rows:
    return open_reference(folder).encode(_hard_texts(folder)[part::parts])


def choose(
    folder: Path,
    hard: Sequence[Rows],
    sample: Sequence[str],
    parts: int = 1,
    each: Callable[..., Iterable[str]] = map,
) -> Choice:
    """The fast encoder where it can read the tokenizer and gives the reference's ids: `hard`, and those of the sample.

    hard: all parts of hard_ids, in order; there is no choice without them.

    The sample is compared in `parts`, by `each`: a pool's map shares them out.
    """
    if reason := settings_of(folder).unfit:
        return Choice(Reference.name, reason)
    try:
        fast = open_fast(folder)
    # Whatever its Rust half meets is a reason not to use it.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Choice(Reference.name, f"gigatoken cannot read this tokenizer: {reason}")
    objections = each(_objection, repeat(folder), [sample[part::parts] for part in range(parts)])
    reason = _objection_to_hard(folder, fast, hard) or next(filter(None, objections), "")
    return Choice(Reference.name, reason) if reason else Choice(Fast.name, "")


def _objection(folder: Path, texts: Sequence[str]) -> str:
    return first_difference(open_fast(folder), open_reference(folder), texts)


def _objection_to_hard(folder: Path, fast: Fast, hard: Sequence[Rows]) -> str:
    assert hard, "nothing would be compared"
    parts = [_hard_texts(folder)[part :: len(hard)] for part in range(len(hard))]
    differences = map(first_difference, repeat(fast), repeat(open_reference(folder)), parts, hard)
    return next(filter(None, differences), "")


@lru_cache(maxsize=4)
def _hard_texts(folder: Path) -> list[str]:
    """None where the fast encoder is no candidate."""
    settings = settings_of(folder)
    return [] if settings.unfit else hard_texts(settings.added_tokens)
