"""Chooses fast encoder (gigatoken) or reference (tokenizers): compares their ids on the stress corpus and a sample of the
dataset.

The fast encoder is chosen if it gives the reference's ids for the stress corpus and for a sample of the dataset.
The reference needs about a second for the stress corpus. `encode_stress_corpus` depends on nothing else, so that other
processes can run it while this process loads the fast encoder, which takes as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from longhaul.data.tokenizers.reference_and_fast_encoder import (
    FastEncoder,
    ReferenceEncoder,
    first_difference,
    open_fast,
    open_reference,
    read_settings,
)
from longhaul.data.tokenizers.stress_corpus import stress_texts
from longhaul.data.tokenizers.token_rows import TokenRows
from longhaul.errors import first_line


class EncoderChoice(NamedTuple):
    """The name of a dataset's encoder, and why it is not the fast encoder ("" where it is)."""

    name: str
    reason: str


def load_reference(folder: Path) -> None:
    """Fill this process's caches with the reference encoder and the stress corpus; forked processes inherit them."""
    open_reference(folder).load()
    _stress_texts(folder)


def load_fast(folder: Path) -> None:
    """Fill this process's cache with the fast encoder, where it supports the tokenizer.

    Exceptions are ignored here: open_fast raises them again on first use.
    """
    if read_settings(folder).unsupported:
        return
    try:
        open_fast(folder).encode(["a"])  # the first batch imports awkward and builds tables
    except (KeyboardInterrupt, SystemExit):
        raise
    # A panic in gigatoken's Rust code is a BaseException. The reference then encodes the dataset.
    except BaseException:
        return


def encode_stress_corpus(
    folder: Path, parts: int = 1, map_parts: Callable[..., Iterable[TokenRows]] = map
) -> Iterable[TokenRows]:
    """Return the reference's ids of the stress corpus, in `parts` parts.

    map_parts: the map of a process pool; the default runs in this process, when the result is read.
    """
    return map_parts(_encode_stress_part, repeat(folder), range(parts), repeat(parts))


def _encode_stress_part(folder: Path, part: int, parts: int) -> TokenRows:
    return open_reference(folder).encode(_stress_texts(folder)[part::parts])


def choose_encoder(
    folder: Path,
    stress_ids: Sequence[TokenRows],
    sample: Sequence[str],
    parts: int = 1,
    map_parts: Callable[..., Iterable[str]] = map,
) -> EncoderChoice:
    """Return the fast encoder if it supports the tokenizer and gives the reference's ids.

    stress_ids: all parts of encode_stress_corpus, in order; at least one.
    sample:     texts of the dataset, compared in `parts` parts by `map_parts`, for example the map of a process pool.
    """
    if reason := read_settings(folder).unsupported:
        return EncoderChoice(ReferenceEncoder.name, reason)
    try:
        fast = open_fast(folder)
    # Any failure of gigatoken, a panic in its Rust code included, is a reason not to use it.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return EncoderChoice(ReferenceEncoder.name, f"gigatoken cannot load this tokenizer: {first_line(error)}")
    differences = map_parts(_difference_in_sample, repeat(folder), [sample[part::parts] for part in range(parts)])
    reason = _difference_in_stress_corpus(folder, fast, stress_ids) or next(filter(None, differences), "")
    return EncoderChoice(ReferenceEncoder.name, reason) if reason else EncoderChoice(FastEncoder.name, "")


def _difference_in_sample(folder: Path, texts: Sequence[str]) -> str:
    return first_difference(open_fast(folder), open_reference(folder), texts)


def _difference_in_stress_corpus(folder: Path, fast: FastEncoder, stress_ids: Sequence[TokenRows]) -> str:
    assert stress_ids, "without the reference's ids nothing would be compared"
    parts = [_stress_texts(folder)[part :: len(stress_ids)] for part in range(len(stress_ids))]
    differences = map(first_difference, repeat(fast), repeat(open_reference(folder)), parts, stress_ids)
    return next(filter(None, differences), "")


@lru_cache(maxsize=4)
def _stress_texts(folder: Path) -> list[str]:
    """Return the stress corpus; empty where the fast encoder does not support the tokenizer."""
    settings = read_settings(folder)
    return [] if settings.unsupported else stress_texts(settings.added_tokens)
