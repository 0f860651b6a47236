"""Computes MinHash bands of near duplicates: 14 bands of 8 hashes over 5-word n-grams, as FineWeb has them.

The parameters are those of FineWeb (Penedo et al., 2024): two documents whose sets of 5-word n-grams have the Jaccard
index s share a band with probability 1 - (1 - s^8)^14: 0.92 at s = 0.8, 0.05 at s = 0.5.
"""

from __future__ import annotations

import hashlib

import numpy as np

from longhaul.data.filters.word_ngrams import ngrams

BANDS = 14
_NGRAM_WORDS, _ROWS, _SEED = 5, 8, 1


def minhash_settings() -> list[object]:
    """Return everything that decides the bands of a text."""
    import rensa

    version = rensa.RMinHash.ALGORITHM_VERSION  # pyright: ignore[reportAttributeAccessIssue]
    return [version, _NGRAM_WORDS, BANDS, _ROWS, _SEED]


def minhash_bands(documents: list[list[str]]) -> np.ndarray:
    """Return [D, 14] uint64: the hashed bands of the MinHash signatures of D documents, given as lists of words.

    Documents with one equal band are near duplicates.
    """
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    signatures = np.empty((len(documents), BANDS * _ROWS), "<u4")
    # One document at a time: rensa's batches start threads, and here each CPU core has a process already.
    for words, signature in zip(documents, signatures, strict=True):
        sketch = RMinHash(BANDS * _ROWS, _SEED)
        sketch.update([" ".join(ngram) for ngram in ngrams(words, _NGRAM_WORDS)] or [" ".join(words)])
        signature[:] = sketch.digest()
    bands = signatures.reshape(-1, _ROWS)
    hashes = [hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in bands]
    return np.frombuffer(b"".join(hashes), "<u8").reshape(len(documents), BANDS)
