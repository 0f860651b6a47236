"""Checks before submission that the first rows of data files are valid and fit templates of tasks, the tokenizer the model."""

from __future__ import annotations

from longhaul.data.check_task_templates import check_task_templates
from longhaul.data.readers.first_rows import first_rows
from longhaul.data.tokenizers.tokenizer_size import check_tokenizer_folder
from longhaul.planning import Plan


def check_inputs(plan: Plan) -> None:
    """Raise UserError for a bad row among the first ones of a data file, a template of a task that fails on the first rows of its
    data, and a tokenizer that does not fit the model.
    """
    for dataset in sorted(plan.used_datasets):
        first_rows(plan, dataset)
    check_task_templates(plan.loaded)
    check_tokenizer_folder(plan)
