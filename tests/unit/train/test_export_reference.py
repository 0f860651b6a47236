"""The prompts that an export completes: of held-out documents where there are any, no two alike."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from longhaul.train.export_reference import SAMPLE_PROMPTS, sample_prompts


class Documents:
    """Documents without end; every beginning comes twice."""

    def __len__(self) -> int:
        return 1

    def openings(self) -> Iterator[tuple[int, ...]]:
        return ((5, number // 2) for number in count())


def test_held_out_documents_come_first_and_no_two_prompts_are_alike():
    found = sample_prompts(validation=Documents(), train=Documents())
    assert found == {"split": "validation", "input_ids": [[5, number] for number in range(SAMPLE_PROMPTS)]}


def test_without_a_validation_split_the_training_documents_stand_in_and_the_split_tells():
    assert sample_prompts(validation=None, train=Documents())["split"] == "train"
