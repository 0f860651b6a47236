"""Every remedy of the package that tells to delete, move or restore a file is followed by a test.

Those about tokens, shards and job files are in test_remedies.py. The others need more than small files: FOLLOWED_ELSEWHERE names
the test that follows them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from longhaul.config.shipped_files import PACKAGE
from tests.unit.test_remedies import REMEDIES

FOLLOWED_ELSEWHERE = {
    "move it away: longhaul makes a link": "unit/artifacts/test_atomic_files.py::test_link_replaces_a_link_and_nothing_else",
    "delete it: the other ranks' records may say enough": (
        "unit/report/test_stalled_collectives.py::test_altered_record_is_refused_and_named"
    ),
    "export it again: rm ": "unit/evaluation/test_evaluate_model.py::test_altered_export_is_refused",
    "download it again: rm -r ": "unit/evaluation/test_evaluate_model.py::test_data_of_the_hub_come_from_what_fetch_stored",
    "restore the file, or pin the newest revisions: longhaul fetch": (
        "unit/planning/test_tampered_lock.py::test_the_remedy_pins_again_instead_of_deleting"
    ),
    "the folder was copied or edited: move it away, and the stage is trained in its place": (
        "unit/train/checkpoint/test_weights_folder.py::test_edited_identity_is_refused_until_the_folder_is_moved_away"
    ),
    "restore the file, or move its weights folder away": (
        "unit/train/checkpoint/test_retention.py::test_nothing_is_removed_while_a_reference_cannot_be_read"
    ),
    "let this user write there (permissions, ulimit -f), then run the same command again": (
        "recovery/test_asynchronous_saves.py::test_after_an_error_the_same_command_finishes"
    ),
    "then run the same command again": (
        "workflow/test_final_failure.py::test_repaired_folder_needs_only_the_same_command"
    ),
    "remove repaired nodes from": (
        "unit/scheduling/test_request_at_submission.py::test_every_stage_must_have_enough_nodes"
    ),
    "if it is certainly dead: rm ": ("unit/artifacts/test_leases.py::test_refusal_names_the_owner_and_the_remedy"),
    "restore it, then run again": ("unit/data/shards/test_write_chunk.py::test_a_source_that_is_removed_is_reported"),
    "move it away, or run with another --directory": (
        "workflow/test_bad_calls.py::test_results_folder_that_cannot_be_created_is_reported"
    ),
    "name another file with --out, or move it away": (
        "unit/scheduling/test_detect_site.py::test_existing_file_is_refused_until_it_is_moved_away"
    ),
    "restore the config.json that belongs to the weights": (
        "unit/train/test_pretrained_weights.py::test_a_config_that_does_not_fit_the_weights_is_refused"
    ),
    "else restore the weights' own config.json": (
        "unit/planning/test_check_pretrained_weights.py::test_weights_of_another_config_are_refused_until_it_is_restored"
    ),
    "restore it there, or remove {} to begin a new one": (
        "unit/train/monitoring/test_trackers.py::test_a_missing_mlflow_run_is_reported_by_its_id"
    ),
    "train the stage again, or restore the tokenizer it was trained with": (
        "unit/export/test_export_checkpoint.py::test_another_tokenizer_is_refused_until_its_own_is_restored"
    ),
    "the checkpoint belongs to another model: move it away": (
        "unit/train/checkpoint/test_resharding.py::test_checkpoint_of_another_model_is_refused_until_it_is_moved_away"
    ),
    "delete it, and run the environment check again": (
        "unit/checks/test_learn_baseline.py::test_report_without_measurements_is_refused_until_it_is_written_again"
    ),
    "delete {}; a new key is created": (
        "unit/serving/test_engines.py::test_a_key_file_with_something_else_is_refused_until_it_is_deleted"
    ),
    "the files were altered after training: restore them, or remove checkpoint.json": (
        "unit/export/test_export_checkpoint.py::test_altered_model_config_is_refused_until_it_is_restored"
    ),
    "Then move the checkpoint's folder away and run the same command again": (
        "recovery/test_unpickling_payloads.py::test_after_the_remedy_the_checkpoint_before_is_used"
    ),
}
"""A part of the remedy's text -> the test that follows it."""


def constants() -> dict[str, str]:
    """Return the text of every constant of the package that holds one string, by name."""
    found: dict[str, str] = {}
    for module in PACKAGE.rglob("*.py"):
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and texts_of(node.value, {}):
                name = node.targets[0].id
                found[name] = f"{found.get(name, '')}{texts_of(node.value, {})}\n"
    return found


def texts_of(node: ast.AST, named: dict[str, str]) -> str:
    """Return the text of an expression: constants by their names, every branch of a condition, {} for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return named.get(name, "{}")
        case ast.FormattedValue(value=value):
            return texts_of(value, named) or "{}"
        case ast.JoinedStr(values=parts):
            separator = ""
        case ast.BinOp(left=left, right=right):
            separator, parts = "", [left, right]
        case ast.IfExp(body=body, orelse=orelse):
            separator, parts = "\n", [body, orelse]
        case _:
            return ""
    return separator.join(texts_of(part, named) for part in parts)


def remedies_in_source() -> dict[str, str]:
    """Return text -> module of every hint of the package that tells to delete, move or restore a file of a run."""
    found, named = {}, constants()
    for module in PACKAGE.rglob("*.py"):
        if {"config", "planning", "readers"} & {*module.parts} or module.name == "container.py":
            continue  # remedies of the plan and of rows: tests/workflow/test_config_remedies.py, test_data_remedies.py
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and len(node.args) == 2:
                words = texts_of(node.args[1], named)
                if re.search(r"\b(delete|rm|move|restore) ", words, re.IGNORECASE):
                    found[words] = str(module.relative_to(PACKAGE))
    return found


def test_hints_in_constants_are_seen():
    assert "export/open_verified_checkpoint.py" in remedies_in_source().values()
    hint = ast.parse("f'{HINT} of {path}' if folder else HINT + ' now'", mode="eval").body
    assert texts_of(hint, {"HINT": "move it"}) == "move it of {}\nmove it now"


def test_every_remedy_about_files_is_in_the_table():
    known = [part for remedy in REMEDIES.values() for part in [remedy.says.split("{folder}")[0]]]
    known += FOLLOWED_ELSEWHERE
    missing = {text: module for text, module in remedies_in_source().items() if not any(part in text for part in known)}
    assert missing == {}


def test_the_other_tests_exist():
    tests = Path(__file__).parents[1]
    places = [named.split("::") for named in FOLLOWED_ELSEWHERE.values()]
    assert [name for path, name in places if f"\ndef {name}(" not in (tests / path).read_text()] == []
