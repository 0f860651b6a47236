"""Chooses the sample prompts, which the exported model completes for the report: how many, how long, from which documents."""

from __future__ import annotations

from itertools import islice

from longhaul.data.sampling.samples import Samples

SAMPLE_PROMPTS, PROMPT_TOKENS = 6, 24
_MOST_DOCUMENTS_READ = 1000


def sample_prompts(**splits: Samples | None) -> dict[str, object]:
    """Return {"split", "input_ids": [[int]]}: how the first documents begin, without repetitions.

    The documents come from the first of the given splits that has any.
    """
    split, samples = next((name, samples) for name, samples in splits.items() if samples)
    distinct = dict.fromkeys(islice(samples.openings(PROMPT_TOKENS), _MOST_DOCUMENTS_READ))
    return {"split": split, "input_ids": [list(ids) for ids in islice(distinct, SAMPLE_PROMPTS)]}
