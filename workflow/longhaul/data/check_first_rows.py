"""Checks before submission that the first rows of data files are valid and the tokenizer fits the model; calls first_rows.py."""

from __future__ import annotations

from longhaul.data.readers.first_rows import first_rows
from longhaul.data.tokenizers.tokenizer_size import check_tokenizer_folder
from longhaul.planning import Plan


def check_inputs(plan: Plan) -> None:
    """Raise UserError for a bad row among the first ones of a data file, and for a tokenizer that does not fit the model."""
    for dataset in sorted(plan.used_datasets):
        first_rows(plan, dataset)
    check_tokenizer_folder(plan)
