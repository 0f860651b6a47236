"""The prompts that an export completes: beginnings of held-out documents where there are any, without repetitions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from longhaul.train.sample_prompts import SAMPLE_PROMPTS, sample_prompts


class EndlessDocuments:
    """Documents without end; every beginning occurs twice."""

    def __len__(self) -> int:
        return 1

    def openings(self, tokens: int) -> Iterator[tuple[int, ...]]:
        return ((5, number // 2) for number in count())


DOCUMENTS: Any = EndlessDocuments()


def test_prompts_come_from_held_out_documents_without_repetitions():
    prompts = sample_prompts(validation=DOCUMENTS, train=DOCUMENTS)
    assert prompts == {"split": "validation", "input_ids": [[5, number] for number in range(SAMPLE_PROMPTS)]}


def test_without_a_validation_split_prompts_come_from_training_documents():
    assert sample_prompts(validation=None, train=DOCUMENTS)["split"] == "train"
