"""Every remedy of the package that tells to delete, move or restore a file is followed by a test.

Those about tokens, shards and job files are in test_remedies.py. The others need more than small files: FOLLOWED_ELSEWHERE names
the test that follows them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from longhaul.config.shipped_files import PACKAGE
from tests.support.remedies_in_source import RemedyInSource, remedies_in_source, texts_of
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
    "restore the files, or train the earlier stage again": (
        "unit/train/test_verified_inputs.py::test_altered_start_is_refused_until_it_is_restored"
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
    # plans
    "copy or download the whole model again: ": (
        "unit/planning/test_check_pretrained_weights.py::test_weights_of_another_config_are_refused_until_it_is_restored"
    ),
    "remove one of the two files from the folder": (
        "unit/planning/test_check_pretrained_weights.py::test_a_tensor_in_two_files_or_a_damaged_header_is_refused_until_removed"
    ),
    "config/init_files.py: choose another run name": (
        "unit/config/test_init_files.py::test_mistake_writes_nothing_until_the_remedy_is_followed"
    ),
    "choose another run name, or move the file away": (
        "unit/config/test_init_files.py::test_existing_file_is_not_overwritten_until_it_is_moved_away"
    ),
    "use it with --site ./": (
        "unit/config/test_init_files.py::test_second_run_is_told_to_use_the_site_file_of_the_first"
    ),
    "config/init_files.py: use one of ": (
        "unit/config/test_init_files.py::test_mistake_writes_nothing_until_the_remedy_is_followed"
    ),
    "config/init_files.py: use {}": (
        "unit/config/test_init_files.py::test_mistake_writes_nothing_until_the_remedy_is_followed"
    ),
    "config/pretrained_format.py: correct the model's config.json": (
        "workflow/test_bad_configs.py::test_unusable_pretrained_folder_is_reported_until_it_is_complete"
    ),
    "use the model's bf16 or fp32 weights": (
        "workflow/test_bad_configs.py::test_unusable_pretrained_folder_is_reported_until_it_is_complete"
    ),
    "config/pretrained_keys.py: use one of {}": (
        "workflow/test_bad_configs.py::test_unusable_pretrained_folder_is_reported_until_it_is_complete"
    ),
    "config/pretrained_keys.py: correct the model's config.json": (
        "workflow/test_bad_configs.py::test_unusable_pretrained_folder_is_reported_until_it_is_complete"
    ),
    "config/safetensors_header.py: the file is incomplete or changed: ": (
        "workflow/test_bad_configs.py::test_unusable_pretrained_folder_is_reported_until_it_is_complete"
    ),
    "config/strict_yaml.py: docsconfig.md": (
        "workflow/test_bad_configs.py::test_unreadable_config_file_is_reported_until_it_is_corrected"
    ),
    "save the file as UTF-8": (
        "workflow/test_bad_configs.py::test_unreadable_config_file_is_reported_until_it_is_corrected"
    ),
    "config/strict_yaml.py: correct the line; ": (
        "workflow/test_bad_configs.py::test_unreadable_config_file_is_reported_until_it_is_corrected"
    ),
    "config/strict_yaml.py: use at most {} levels": (
        "workflow/test_bad_configs.py::test_unreadable_config_file_is_reported_until_it_is_corrected"
    ),
    "write the config without aliases; ": (
        "workflow/test_bad_configs.py::test_unreadable_config_file_is_reported_until_it_is_corrected"
    ),
    "give the path of an existing YAML file": (
        "workflow/test_bad_configs.py::test_missing_config_is_reported_until_a_file_is_named"
    ),
    "give the path of a config; one glob can name many data files": (
        "workflow/test_bad_configs.py::test_missing_config_is_reported_until_a_file_is_named"
    ),
    "give the path of a YAML file": (
        "workflow/test_bad_configs.py::test_missing_config_is_reported_until_a_file_is_named"
    ),
    "give the path of a readable YAML file": (
        "workflow/test_bad_configs.py::test_what_is_no_file_as_config_or_site_is_reported_until_it_is_one"
    ),
    "use a model with weights, or train from random weights": (
        "workflow/test_bad_configs.py::test_unusable_pretrained_folder_is_reported_until_it_is_complete"
    ),
    "planning/check_files_exist.py: complete the download": (
        "workflow/test_bad_configs.py::test_unusable_pretrained_folder_is_reported_until_it_is_complete"
    ),
    "give the path of a Hugging Face model folder": (
        "workflow/test_bad_configs.py::test_unusable_pretrained_folder_is_reported_until_it_is_complete"
    ),
    "planning/check_files_exist.py: give the path of a Hugging Face tokenizer folder": (
        "unit/planning/test_check_files_exist.py::test_tokenizer_folder_and_chat_template_must_exist"
    ),
    "planning/check_files_exist.py: fill or remove the file": (
        "unit/planning/test_check_files_exist.py::test_unusable_files_are_refused_until_the_remedy_is_followed"
    ),
    "planning/check_files_exist.py: list each file once": (
        "unit/planning/test_check_files_exist.py::test_unusable_files_are_refused_until_the_remedy_is_followed"
    ),
    "rename the file or its folder": (
        "unit/planning/test_check_files_exist.py::test_name_that_snakemake_or_json_cannot_represent_is_refused_until_it_is_renamed"
    ),
    ", or sequence_length to at most ": (
        "workflow/test_bad_configs.py::test_sliding_window_that_the_layout_would_ignore_is_reported_until_the_remedy_is_followed"
    ),
    "planning/find_data_files.py: make it readable, or name other files": (
        "unit/planning/test_find_data_files.py::test_a_folder_that_cannot_be_read_is_refused_until_it_can"
    ),
    "name the files with a glob such as folder/**/*.jsonl, ": (
        "unit/planning/test_find_data_files.py::test_a_folder_has_one_format_unless_the_format_is_set"
    ),
    "name a smaller folder": ("unit/planning/test_find_data_files.py::test_a_folder_with_too_many_entries_is_refused"),
    "remove the link, or name other folders": (
        "unit/planning/test_find_data_files.py::test_a_loop_of_links_is_refused_until_it_is_removed"
    ),
    "remove the link, or restore its target": (
        "unit/planning/test_find_data_files.py::test_what_is_no_file_is_refused_until_it_is_removed"
    ),
    "planning/find_data_files.py: {}": (
        "unit/planning/test_find_data_files.py::test_what_is_no_file_is_refused_until_it_is_removed"
    ),
    "name the folder that `make MPI=1` of nccl-tests writes": (
        "unit/checks/test_nccl_tests.py::test_missing_programs_are_named_before_anything_is_submitted"
    ),
    "add node.gpus and node.gpu_memory_gib to the site file": (
        "unit/planning/test_needed_nodes.py::test_site_without_gpu_memory_is_refused_until_it_is_added"
    ),
    "config/load_config.py: docsconfig.md": (
        "workflow/test_bad_configs.py::test_the_page_that_a_remedy_names_is_there"
    ),
}
"""A part of the remedy, with its module where other modules have the same words -> the test that follows it."""
NOT_FOLLOWED: dict[str, str] = {}
"""A part of a remedy that no test can follow -> the reason."""


REMEDIES_OF_PLANS = ("config/", "planning/")
"""test_config_remedies.py scans these packages: there one table tries nearly all remedies."""
COMPLETE: tuple[str, ...] = ()
"""Packages of which every remedy is followed. Of the others, remedies that tell to delete, move or restore a file are."""


def remedies_to_follow() -> list[RemedyInSource]:
    """Return the remedies that must be in a table of this file or of test_remedies.py."""
    return [
        remedy
        for remedy in remedies_in_source()
        if not remedy.module.startswith(
            (*REMEDIES_OF_PLANS, "data/readers/", "jobs/container.py")
        )  # test_data_remedies.py
        and (
            remedy.module.startswith(COMPLETE) or re.search(r"\b(delete|rm|move|restore) ", remedy.text, re.IGNORECASE)
        )
    ]


def test_hints_in_constants_are_seen():
    assert "export/open_verified_checkpoint.py" in {remedy.module for remedy in remedies_in_source()}
    hint = ast.parse("f'{HINT} of {path}' if folder else HINT + ' now'", mode="eval").body
    assert texts_of(hint, {"HINT": "move it"}) == "move it of {}\nmove it now"


def test_every_remedy_about_files_is_in_the_table():
    known = [part for remedy in REMEDIES.values() for part in [remedy.says.split("{folder}")[0]]]
    known += [*FOLLOWED_ELSEWHERE, *NOT_FOLLOWED]
    assert [str(remedy) for remedy in remedies_to_follow() if not any(part in str(remedy) for part in known)] == []


def test_the_tables_name_remedies_that_exist():
    texts = [str(remedy) for remedy in remedies_in_source()]
    texts += [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]  # classes have remedies, too
    assert [part for part in (*FOLLOWED_ELSEWHERE, *NOT_FOLLOWED) if not any(part in text for text in texts)] == []


def test_the_other_tests_exist():
    tests = Path(__file__).parents[1]
    places = [named.split("::") for named in FOLLOWED_ELSEWHERE.values()]
    assert [name for path, name in places if f"\ndef {name}(" not in (tests / path).read_text()] == []
