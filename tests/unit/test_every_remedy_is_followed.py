"""Every remedy is followed by a test, or has a reason why no test can.

Those about tokens, shards and job files are in test_remedies_about_files.py. The others need more than small files:
FOLLOWED_ELSEWHERE names the test that follows them.
"""

from __future__ import annotations

import ast
from pathlib import Path

from longhaul.config.shipped_files import PACKAGE
from tests.support.remedies_in_source import RemedyInSource, remedies_in_source, texts_of
from tests.unit.test_remedies_about_files import REMEDIES

FOLLOWED_ELSEWHERE = {
    "for a model.pretrained.hub, do it in a copy of its folder": (
        "unit/planning/test_check_files_exist.py::test_a_corrected_copy_of_a_model_folder_is_accepted"
    ),
    "for a tokenizer.hub, do it in a copy of its folder": (
        "unit/data/tokenizers/test_tokenizer_keys.py::test_a_corrected_copy_of_a_tokenizer_folder_is_accepted"
    ),
    "move it away: longhaul makes a link": "unit/artifacts/test_atomic_files.py::test_link_replaces_a_link_and_nothing_else",
    "delete it: the other ranks' records may say enough": (
        "unit/report/test_stalled_collectives.py::test_altered_record_is_refused_and_named"
    ),
    "export it again: rm ": "unit/evaluation/test_evaluate_model.py::test_altered_export_is_refused",
    "download it again: rm -r ": "unit/evaluation/test_evaluate_model.py::test_data_of_the_hub_come_from_what_fetch_stored",
    "restore the file, or pin the newest revisions: longhaul fetch": (
        "unit/planning/test_tampered_hub_lock.py::test_the_remedy_pins_again_instead_of_deleting"
    ),
    "the folder was copied or edited: move it away, and the stage is trained in its place": (
        "unit/train/checkpoint/test_weights_folder.py::test_edited_identity_is_refused_until_the_folder_is_moved_away"
    ),
    "finish the run with the release that saved it, or change `run` in the config": (
        "unit/report/test_planned_changes.py::"
        "test_checkpoint_of_another_release_is_refused_until_the_run_has_another_name"
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
        "workflow/test_command_line_mistakes.py::test_results_folder_that_cannot_be_created_is_reported"
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
    "config/strict_yaml.py: {} lists the keys": (
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
    "name the folder that `make MPI=1` of nccl-tests writes": (
        "unit/checks/test_nccl_tests.py::test_missing_programs_are_named_before_anything_is_submitted"
    ),
    "add node.gpus and node.gpu_memory_gib to the site file": (
        "unit/planning/test_needed_nodes.py::test_site_without_gpu_memory_is_refused_until_it_is_added"
    ),
    "config/load_config.py: {} lists all keys": (
        "workflow/test_bad_configs.py::test_the_page_that_a_remedy_names_is_there"
    ),
    # serving
    "use 16 to 256 letters, digits, _ and -": (
        "unit/scheduling/test_serve_verb.py::test_a_key_of_a_wrong_form_is_refused"
    ),
    "chmod 600 ": ("unit/serving/test_engines.py::test_a_key_file_is_for_its_owner_alone_and_for_one_server"),
    "start again if another process has taken the port": (
        "unit/serving/test_check_access.py::test_an_answer_of_another_process_is_not_taken_for_that_of_the_server"
    ),
    "remove options of the site key `serving` that open further addresses": (
        "unit/serving/test_check_access.py::test_the_address_of_a_server_is_that_of_its_processes"
    ),
    "serving/engine_version.py: ": (
        "unit/serving/test_engine_version.py::test_in_the_job_another_answer_is_an_error_until_the_site_file_is_corrected"
    ),
    "serving/link_server_nodes.py: name a network interface of the cluster": (
        "unit/serving/test_link_server_nodes.py::test_nodes_meet_at_no_other_address_until_an_interface_is_named"
    ),
    "restore the checkpoint's files, or train and export the stage again": (
        "unit/serving/test_check_server.py::test_altered_reference_values_are_refused_until_they_are_restored"
    ),
    "set serve.port to another port, or leave it out": (
        "unit/serving/test_run_server.py::test_a_port_in_use_is_refused"
    ),
    "increase start_timeout_s if it was still loading": (
        "unit/serving/test_server_process.py::test_a_server_that_is_slow_is_reported_until_it_has_more_time"
    ),
    "what it printed is above; try it alone: ": (
        "unit/serving/test_server_process.py::test_a_server_that_ends_is_reported_with_its_code"
    ),
    # scheduling
    "scheduling/allocation.py: submit job.sbatch with sbatch, or run the config: longhaul run CONFIG": (
        "unit/scheduling/test_allocation.py::test_a_job_outside_of_an_allocation_is_refused_until_it_is_submitted"
    ),
    "drop --set-resources, or set nodes in the config": (
        "unit/scheduling/test_allocation.py::test_an_allocation_of_another_size_is_refused_until_the_sizes_agree"
    ),
    "scheduling/allocation.py: check slurmctld": (
        "unit/scheduling/test_allocation.py::test_a_silent_slurm_is_reported_until_it_answers"
    ),
    "name a config or a site file that uses Slurm": (
        "unit/scheduling/test_check_site.py::test_site_without_slurm_is_refused_until_one_with_slurm_is_named"
    ),
    "scheduling/check_site.py: call this on a login node": (
        "unit/scheduling/test_check_site.py::test_a_machine_of_no_cluster_is_named_once_until_a_login_node_asks"
    ),
    "name another file; use {}": (
        "unit/scheduling/test_detect_site.py::test_file_whose_name_is_no_name_of_a_site_is_refused_until_another_is_named"
    ),
    "call this on a login node, and try again": (
        "unit/scheduling/test_detect_site.py::test_cluster_without_partitions_and_silent_slurm_are_refused_until_slurm_shows_some"
    ),
    "ask your centre, or try again later": (
        "unit/scheduling/test_detect_site.py::test_cluster_without_partitions_and_silent_slurm_are_refused_until_slurm_shows_some"
    ),
    "write the path of your {} into software of the site file": (
        "unit/scheduling/test_find_software.py::test_missing_path_is_refused_on_this_machine_until_it_is_right_and_is_a_warning_on_a_cluster"
    ),
    "scheduling/job_verbs.py: use one of {}": (
        "workflow/test_command_line_mistakes.py::test_a_job_runs_after_its_kind_and_its_file_are_named_as_the_remedies_say"
    ),
    "scheduling/job_verbs.py: name {}": (
        "workflow/test_command_line_mistakes.py::test_a_job_runs_after_its_kind_and_its_file_are_named_as_the_remedies_say"
    ),
    "name one of {} in the site file": (
        "unit/scheduling/test_master_address.py::test_missing_interface_is_refused_until_one_that_exists_is_named"
    ),
    "wait until they end, or cancel them": (
        "unit/scheduling/test_prune_results.py::test_active_run_is_refused_until_nothing_works_on_it"
    ),
    "scheduling/prune_results.py: stop it: longhaul serve {} {} --stop": (
        "unit/scheduling/test_prune_results.py::test_active_run_is_refused_until_nothing_works_on_it"
    ),
    "scheduling/read_job_queue.py: ask again later": (
        "unit/scheduling/test_read_job_queue.py::test_silent_slurm_is_reported_until_it_answers"
    ),
    "scheduling/request_at_submission.py: {}": (
        "unit/scheduling/test_request_at_submission.py::test_quarantine_that_leaves_too_few_nodes_is_refused_until_there_are_enough"
    ),
    "; to retry it without a change: longhaul retry {}": (
        "unit/scheduling/test_retry_policy.py::test_refusal_has_cause_and_time_until_the_failure_is_retried"
    ),
    "drop it: {} is the run's only config file": (
        "unit/scheduling/test_run_verb.py::test_second_config_is_refused_until_it_is_dropped"
    ),
    "use --stop on the host where the server was started": (
        "unit/scheduling/test_serve_verb.py::test_a_server_of_another_host_is_stopped_there"
    ),
    "longhaul status {} shows jobs": (
        "unit/scheduling/test_serve_verb.py::test_stop_cancels_the_job_of_this_stage_alone"
    ),
    "scheduling/serve_verb.py: use one of {}": (
        "unit/scheduling/test_serve_verb.py::test_a_stage_is_refused_until_it_is_one_with_an_export"
    ),
    "set export to last or best, and run": (
        "unit/scheduling/test_serve_verb.py::test_a_stage_is_refused_until_it_is_one_with_an_export"
    ),
    "scheduling/serve_verb.py: longhaul fetch {}": (
        "unit/scheduling/test_serve_verb.py::test_a_model_whose_size_is_unknown_needs_fetch_first"
    ),
    "scheduling/serve_verb.py: longhaul run {}": (
        "unit/scheduling/test_serve_verb.py::test_a_stage_is_refused_until_it_is_one_with_an_export"
    ),
    "unset LONGHAUL_API_KEY, or set serving.engine in the site": (
        "unit/scheduling/test_serve_verb.py::test_a_key_is_refused_where_the_engine_takes_none_until_it_is_unset_or_the_engine_is_another"
    ),
    "stop it first: longhaul serve {} {} --stop": (
        "unit/scheduling/test_serve_verb.py::test_a_second_server_of_a_stage_is_refused_until_the_first_is_stopped"
    ),
    "scheduling/serve_verb.py: longhaul site check {}": (
        "unit/scheduling/test_serve_verb.py::test_a_refusal_by_slurm_names_the_check"
    ),
    "name the run's YAML file, or its folder results/<run>": (
        "unit/scheduling/test_show_status.py::test_run_that_does_not_exist_is_refused_until_one_is_named"
    ),
    "name the run's config or folder, or work in the folder that holds results/": (
        "unit/scheduling/test_show_status.py::test_run_that_does_not_exist_is_refused_until_one_is_named"
    ),
    "ask again; if that does not help, check the file system and the permissions": (
        "unit/scheduling/test_show_status.py::test_file_that_cannot_be_read_is_named_until_it_can"
    ),
    "submit through Slurm, or load its module": (
        "unit/scheduling/test_slurm_client.py::test_missing_slurm_command_is_named_until_it_is_on_the_path"
    ),
    "scheduling/snakefile_functions.py: name one: exactly": (
        "workflow/test_command_line_mistakes.py::test_after_the_remedy_snakemake_plans_the_run"
    ),
    "write it into the config file: exactly one file": (
        "workflow/test_command_line_mistakes.py::test_after_the_remedy_snakemake_plans_the_run"
    ),
    "scheduling/snakefile_functions.py: drop the option: ": (
        "workflow/test_command_line_mistakes.py::test_after_the_remedy_snakemake_plans_the_run"
    ),
    "scheduling/snakefile_functions.py: use --profile ": (
        "workflow/test_command_line_mistakes.py::test_after_the_remedy_snakemake_plans_the_run"
    ),
    # artifacts, cli
    "artifacts/atomic_files.py: name a file": (
        "unit/artifacts/test_atomic_files.py::test_no_file_is_written_there_until_another_is_named"
    ),
    "name another file, or run what writes it: longhaul run CONFIG": (
        "unit/artifacts/test_atomic_files.py::test_what_cannot_be_read_is_refused_until_it_is_a_file"
    ),
    "artifacts/atomic_files.py: give the path of a file": (
        "unit/artifacts/test_atomic_files.py::test_what_cannot_be_read_is_refused_until_it_is_a_file"
    ),
    "artifacts/atomic_files.py: make it a file that you can read": (
        "unit/artifacts/test_atomic_files.py::test_what_cannot_be_read_is_refused_until_it_is_a_file"
    ),
    "artifacts/line_records.py: make it a file that you can read": (
        "unit/artifacts/test_line_records.py::test_folder_in_place_of_a_file_is_named_until_it_is_a_file"
    ),
    "artifacts/atomic_files.py: {}": ("workflow/test_full_disk.py::test_disk_with_free_space_is_not_mentioned"),
    "remove exports that you do not need: longhaul prune": (
        "unit/scheduling/test_prune_results.py::test_only_delete_removes_and_says_how_much"
    ),
    "name a node of the list: longhaul nodes": (
        "unit/report/test_node_history.py::test_released_nodes_leave_the_quarantine"
    ),
    "cli.py: use one of {}": ("unit/fetch/test_hub_downloads.py::test_fetch_of_one_task_pins_nothing_else"),
    "cli.py: use one of them": ("unit/scheduling/test_show_status.py::test_watch_of_json_is_refused_until_one_is_left"),
    "name the folder of a failed job, as its log does": (
        "unit/scheduling/test_retry_policy.py::test_retry_verb_deletes_the_failure"
    ),
    "give the path of results/<run>/data/<dataset>.json": (
        "unit/data/shards/test_inspect_documents.py::test_a_file_that_is_no_manifest_is_refused_until_the_manifest_is_named"
    ),
    # fetch
    "fetch/hub_downloads.py: ": ("unit/fetch/test_hub_downloads.py::test_after_the_remedy_the_sources_are_pinned"),
    "set the dataset's hub `split` to one of {}": (
        "unit/fetch/test_hub_downloads.py::test_after_the_remedy_the_sources_are_pinned"
    ),
    "set the dataset's hub `name` to one of its configurations": (
        "unit/fetch/test_hub_downloads.py::test_after_the_remedy_the_sources_are_pinned"
    ),
    "set the dataset's `columns` to some of {}": (
        "unit/fetch/test_hub_downloads.py::test_after_the_remedy_the_sources_are_pinned"
    ),
    "set the dataset's `columns` to text columns": (
        "unit/fetch/test_task_data.py::test_column_that_is_no_text_is_refused_until_another_is_named"
    ),
    "list the names: lm_eval ls tasks; or define it in": (
        "unit/fetch/test_task_data.py::test_task_that_cannot_run_is_refused_until_another_one_is_named"
    ),
    "check its name and options in the task, the network": (
        "unit/fetch/test_hub_downloads.py::test_task_whose_data_cannot_be_downloaded_until_its_name_is_right"
    ),
    "in the job environment, or remove the task": (
        "unit/fetch/test_task_data.py::test_task_that_cannot_run_is_refused_until_another_one_is_named"
    ),
    "use another task, or write a task file with a metric of lm_eval": (
        "unit/fetch/test_task_data.py::test_task_that_cannot_run_is_refused_until_another_one_is_named"
    ),
    # jobs, report, runtime
    "name a folder of storage.weights and storage.data that you may": (
        "unit/jobs/test_launch_files.py::test_folders_that_pyxis_mounts_are_created_before_the_first_job_or_others_are_named"
    ),
    "run in a folder whose name has no quotes, $, % or line breaks": (
        "workflow/test_command_line_mistakes.py::test_working_folder_with_unusable_name_is_reported_until_it_has_another"
    ),
    "call it in the working folder of a run whose environment check": (
        "unit/report/test_node_history.py::test_folder_without_results_is_named_until_a_check_has_run"
    ),
    "start it with `longhaul run CONFIG`, or name another run's": (
        "unit/report/test_run_status.py::test_run_without_a_plan_is_refused_until_one_is_named_that_has_started"
    ),
    "run `longhaul fetch` first": ("unit/report/test_tuning_table.py::test_a_hub_model_must_be_fetched_first"),
    "start it through its launch.sh, in an allocation of the planned": (
        "unit/runtime/test_process_rank.py::test_another_size_than_planned_is_refused_until_it_is_that"
    ),
    "remove it, or set storage.scratch to a folder of your own": (
        "unit/checks/test_environment.py::test_ops_folder_that_others_may_write_to_is_refused_until_it_is_removed"
    ),
    "set storage.scratch to a folder that you may write to": (
        "unit/checks/test_environment.py::test_scratch_folder_that_cannot_be_made_is_refused_until_another_is_set"
    ),
    "correct the task file; for a task of lm_eval, use another one": (
        "unit/fetch/test_task_data.py::test_task_file_that_lm_eval_cannot_use_is_refused_until_it_is_corrected"
    ),
    "set interconnect.socket_interface in the site file to an": (
        "unit/runtime/test_rendezvous.py::test_interface_that_does_not_exist_is_reported_until_another_is_set"
    ),
    "MASTER_ADDR must be this node and MASTER_PORT free": (
        "unit/runtime/test_rendezvous.py::test_port_in_use_is_reported_until_it_is_free"
    ),
    "wait for its end, or remove the folder": (
        "unit/planning/test_find_data_files.py::test_output_of_a_job_that_has_not_ended_is_refused"
    ),
    "let the admins enter the nodes' addresses in the reverse zone": (
        "unit/runtime/test_rendezvous.py::test_a_slow_name_service_is_named_until_it_is_quick"
    ),
    "another release of longhaul wrote it, or its writer was stopped": (
        "unit/report/test_run_status.py::test_plan_of_another_release_is_refused_until_the_run_writes_it_again"
    ),
    "name a folder of your own with --directory": (
        "unit/scheduling/test_snakefile_functions.py::test_folder_that_cannot_be_written_is_refused_until_another_is_named"
    ),
    "restore the file, or download the pretrained model again": (
        "unit/train/test_pretrained_weights.py::test_a_damaged_file_of_the_folder_is_refused_until_it_is_restored"
    ),
    "delete it: the trackers begin new runs": (
        "unit/train/checkpoint/test_tampered_files.py::test_damaged_ids_of_tracker_runs_are_refused_until_they_are_deleted"
    ),
    "remove it from the folder": (
        "unit/planning/test_find_data_files.py::test_what_is_no_file_is_refused_until_it_is_removed"
    ),
    "name a file, or a folder of files": (
        "unit/planning/test_find_data_files.py::test_a_pipe_that_is_named_itself_is_refused"
    ),
    # train, checkpoints, checks
    "give the stage more minutes, or lower recovery.stop_margin_s": (
        "recovery/test_graceful_stop.py::test_with_enough_time_the_stage_continues"
    ),
    "train/build_model.py: set vocab_size to at least {}": (
        "unit/train/test_build_model.py::test_vocabulary_smaller_than_the_tokenizer_is_refused_until_it_is_larger"
    ),
    "correct the keys rope_scaling and rope_theta of the model": (
        "unit/train/test_build_model.py::test_network_without_the_asked_scaling_is_refused_until_the_keys_are_those_of_the_network"
    ),
    "set stages.{}.from.checkpoint to last": (
        "unit/report/test_planned_changes.py::test_start_from_a_missing_best_checkpoint_is_refused_until_it_is_the_last_one"
    ),
    "set the length back to {} steps, or set restart: true": (
        "unit/report/test_planned_changes.py::test_more_steps_under_a_decaying_schedule_are_refused_until_the_remedy_is_followed"
    ),
    "add documents, or reduce validation_fraction": (
        "unit/train/test_count_steps.py::test_epochs_of_an_empty_split_are_refused_until_it_has_documents"
    ),
    "add {} to the stage's skip_batches": (
        "unit/train/test_loss_tokens.py::test_a_batch_without_loss_tokens_is_refused_until_it_is_skipped"
    ),
    "remove it from skip_batches, or set restart: true": (
        "unit/train/test_loss_tokens.py::test_a_batch_that_was_trained_on_is_not_skipped_until_the_stage_restarts"
    ),
    "or choose another bad_steps.policy or limit": (
        "recovery/test_bad_steps.py::test_the_weights_are_those_of_a_run_with_these_skip_batches"
    ),
    "use another checkpoint": (
        "recovery/test_unpickling_payloads.py::test_after_the_remedy_the_checkpoint_before_is_used"
    ),
    "write the skipped batches again, such as": (
        "unit/train/checkpoint/test_tampered_files.py::test_the_remedy_of_damaged_skipped_batches_is_to_write_them_again"
    ),
    "lower node.memory_mb in the site file to the memory that jobs get": (
        "unit/planning/test_save_mode.py::test_a_save_is_synchronous_where_its_copy_does_not_fit"
    ),
    "repair what it names, for example a missing C compiler": (
        "unit/train/test_compile_layers.py::test_a_compiler_that_fails_ends_the_training_until_it_is_repaired_or_off"
    ),
    "pip install {}, or set trackers.{}: false": (
        "unit/train/monitoring/test_trackers.py::test_a_missing_package_is_reported_by_its_name_until_the_tracker_is_off"
    ),
    "`wandb login` on this site; or unset WANDB_MODE": (
        "unit/train/monitoring/test_trackers.py::test_wandb_without_a_valid_key_is_refused_until_it_is_offline"
    ),
    "set MLFLOW_TRACKING_URI to where it was begun, or remove {}": (
        "unit/train/monitoring/test_trackers.py::test_a_missing_mlflow_run_is_reported_by_its_id"
    ),
    "save the model with save_pretrained: pickles are not read": (
        "unit/train/test_pretrained_weights.py::test_a_folder_without_safetensors_is_refused_until_it_has_some"
    ),
    "checkpoint_io/safetensors_reader.py: ": (
        "unit/checkpoint_io/test_safetensors_reader.py::test_a_damaged_safetensors_file_is_refused_until_it_is_written_again"
    ),
    "run the check: longhaul run {} {}": (
        "unit/checks/test_learn_baseline.py::test_run_without_a_passed_check_is_refused_until_it_has_passed"
    ),
    "move it to a folder whose name has no : and no ,": (
        "unit/jobs/test_launch_files.py::test_a_folder_with_a_bind_separator_is_refused_until_it_is_moved"
    ),
    # evaluation
    "fetch it where there is a network: longhaul fetch CONFIG": (
        "unit/evaluation/test_evaluate_model.py::test_data_of_the_hub_come_from_what_fetch_stored"
    ),
    # export
    "set the stage's `export` to one of these": (
        "unit/export/test_export_checkpoint.py::test_missing_checkpoint_is_refused_until_an_existing_one_is_named"
    ),
    "set the stage's `export` to last; to export `best`": (
        "unit/export/test_export_checkpoint.py::test_checkpoint_without_reference_values_is_refused_until_the_last_one_is_exported"
    ),
    # data
    "data/check_task_templates.py: correct {}": (
        "unit/data/test_check_task_templates.py::test_a_template_that_fails_in_the_job_is_refused_until_it_is_corrected"
    ),
    "remove this operation from the template": (
        "unit/data/test_check_task_templates.py::test_an_operation_that_never_ends_is_refused_until_it_is_removed"
    ),
    "name the split to evaluate: ": (
        "unit/data/test_check_task_templates.py::test_a_template_that_fails_in_the_job_is_refused_until_it_is_corrected"
    ),
    "data/check_task_templates.py: use one of ": (
        "unit/data/test_check_task_templates.py::test_a_template_that_fails_in_the_job_is_refused_until_it_is_corrected"
    ),
    "name columns with text in decontaminate.columns": (
        "unit/data/filters/test_filter_documents.py::test_errors_in_evaluation_files_have_a_location_until_the_column_is_named"
    ),
    "add documents that are not in the evaluation files, ": (
        "unit/data/filters/test_filter_documents.py::test_a_dataset_of_only_evaluation_texts_is_refused_until_the_remedy_is_followed"
    ),
    "data/readers/read_documents.py: check its `files`": (
        "unit/data/readers/test_read_documents.py::test_a_dataset_without_files_or_a_missing_file_is_refused_until_there_is_one"
    ),
    "restore it, or correct the dataset's `files`": (
        "unit/data/readers/test_read_documents.py::test_a_dataset_without_files_or_a_missing_file_is_refused_until_there_is_one"
    ),
    "data/readers/select_reader.py: set the dataset's `format`": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "raise the stage's sequence_length, use another truncate": (
        "unit/data/sampling/test_count_chats.py::test_a_length_that_keeps_no_conversation_is_refused_until_the_remedy_is_followed"
    ),
    "data/sampling/samples.py: add documents": (
        "unit/data/sampling/test_samples.py::test_training_split_without_a_sample_is_refused"
    ),
    "data/sampling/samples.py: use a dataset of kind chat": (
        "unit/data/sampling/test_samples.py::test_texts_are_refused_until_a_dataset_of_chats_is_used"
    ),
    "correct the texts of its `files`, or its `columns`": (
        "unit/data/shards/test_tokenize_dataset.py::test_documents_without_anything_to_train_on_are_counted"
    ),
    "run again: the sources are then indexed again": (
        "unit/data/shards/test_dataset_of_several_jobs.py::test_a_touched_source_is_accepted_and_a_changed_one_is_indexed_again"
    ),
    "wait until the program that writes it has finished": (
        "unit/data/shards/test_write_chunk.py::test_a_source_that_changes_is_refused_until_the_next_run"
    ),
    "make it readable, or correct the dataset's `files`": (
        "unit/data/shards/test_write_chunk.py::test_a_source_that_cannot_be_read_is_refused_until_it_can"
    ),
    "give the tokenizer's added tokens smaller ids": (
        "workflow/test_bad_data.py::test_a_tokenizer_with_ids_too_large_for_shards_is_refused_until_they_are_smaller"
    ),
    "pass the path of its tokenizer.json with --tokenizer": (
        "unit/data/shards/test_inspect_documents.py::test_another_tokenizer_is_refused_until_its_own_is_passed"
    ),
    "choose another --first": (
        "unit/data/shards/test_inspect_documents.py::test_a_missing_split_or_document_is_reported_until_another_is_chosen"
    ),
    "data/shards/inspect_documents.py: choose one of ": (
        "unit/data/shards/test_inspect_documents.py::test_a_missing_split_or_document_is_reported_until_another_is_chosen"
    ),
    "data/shards/tokenize_dataset.py: ": (
        "unit/data/shards/test_tokenize_dataset.py::test_a_job_without_files_template_or_folder_is_refused_until_it_has_them"
    ),
    "set eos_token in its tokenizer_config.json": (
        "workflow/test_bad_data.py::test_a_tokenizer_without_eos_or_template_is_refused_until_it_is_set"
    ),
    "set tokenizer.chat_template, for example to ": (
        "workflow/test_bad_data.py::test_a_tokenizer_without_eos_or_template_is_refused_until_it_is_set"
    ),
    "set tokenizer.path to a Hugging Face tokenizer folder": (
        "workflow/test_bad_data.py::test_an_unusable_tokenizer_or_template_is_refused_until_another_is_named"
    ),
    "set it to a Jinja file": (
        "workflow/test_bad_data.py::test_an_unusable_tokenizer_or_template_is_refused_until_another_is_named"
    ),
    "remove the operation, or give another template": (
        "workflow/test_bad_data.py::test_a_chat_template_with_an_endless_operation_is_refused_until_another_is_given"
    ),
    "data/tokenizers/tokenizer_size.py: give the path": (
        "unit/data/tokenizers/test_tokenizer_size.py::test_what_is_no_tokenizer_is_refused_until_one_is_there"
    ),
    "use the tokenizer of the pretrained model; ": (
        "unit/data/tokenizers/test_tokenizer_size.py::test_a_larger_tokenizer_is_refused_until_another_is_used"
    ),
    "remove it from the dataset's `files`, or fill it": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "every document needs text: fix or remove this row": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "data/readers/text_values.py: fix or remove this row": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "the file is damaged or truncated: fetch it again": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "convert the file: iconv -f <its encoding> -t utf-8": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "set the column name in the dataset's `columns`, or add the column": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "fix or remove the line": ("workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"),
    "quote texts that contain commas": ("workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"),
    "write one JSON object {…} for each document": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "write the file again with one such column": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "write the file again with valid text": ("workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"),
    "fix the file, or write one object per line as .jsonl": (
        "workflow/test_data_remedies.py::test_after_the_remedy_the_data_are_read"
    ),
    "data/readers/conversations.py: ": (
        "workflow/test_data_remedies.py::test_every_remedy_of_a_conversation_is_followed"
    ),
    "remove the private characters": (
        "unit/data/tokenizers/test_chat_template.py::test_every_remedy_of_a_chat_template_is_followed"
    ),
    "give a template with {% generation %} markers": (
        "unit/data/tokenizers/test_chat_template.py::test_every_remedy_of_a_chat_template_is_followed"
    ),
    "set no message's weight to 0, or use another chat template": (
        "unit/data/tokenizers/test_chat_template.py::test_every_remedy_of_a_chat_template_is_followed"
    ),
    "shorten the document, or raise max_document_mb": (
        "unit/data/readers/test_read_documents.py::test_every_format_refuses_a_document_that_is_too_long"
    ),
    "compress it again without zstd's --long and --ultra": (
        "unit/data/readers/test_zstd_window.py::test_a_large_window_is_refused"
    ),
    "remove the turn, or give it weight: 0": (
        "unit/data/shards/test_tokenize_dataset.py::test_an_empty_assistant_turn_is_refused_until_the_remedy_is_followed"
    ),
    "shorten the document, or leave out such documents with bad_rows: skip": (
        "unit/data/shards/test_encoding_memory.py::test_the_longest_document_fits_and_a_longer_one_is_refused"
    ),
    "run again: another attempt takes another port": (
        "unit/serving/test_link_server_nodes.py::test_a_port_that_is_in_use_is_named"
    ),
    "check that the first node is up": (
        "unit/serving/test_link_server_nodes.py::test_a_node_waits_for_the_first_one_to_start"
    ),
}
"""A part of the remedy, with its module where other modules have the same words -> the test that follows it."""
NOT_FOLLOWED = {
    "{}; the full report is {}": "nodes that must be repaired or excluded; the remedy names what is wrong",
    "read in the job's log why they did not start": "another node that does not start: the log of its job tells the cause",
    "check that rank 0's node is up, and that no firewall": "another node, or a firewall between two",
    "checks/collective_benchmarks.py: {}": "a broken GPU or node: the log of its rank tells which",
    "ask the administrators to test": "nodes that administrators repair",
    "checks/node_connections.py: read in the job's log": "another node that ends: the log of its job tells the cause",
    "start from a stage that trained the same model": "another training",
    "use more GPUs, or shorten sequence_length": "a full GPU; test_out_of_memory.py compares the settings that are named before",
    "train/checkpoint/checkpoint_manager.py: run the same command again": "damage of all checkpoints while the stage trains",
    "train/fp8_products.py: set precision to bf16": "a GPU; with bf16, none of this code runs",
    "one with data parallelism and ZeRO only": "a checkpoint of another program",
    "train with ZeRO stage 1 or higher": "another training; test_zero_checkpoint.py opens checkpoints of each stage of ZeRO",
    "another program wrote it: resume with the parallel layout": "a checkpoint of another program",
    "use a release of the engine that answers `echo` with `logprobs`": "another release of an engine",
    "serving/ask_server.py: what it printed is above": "the engine's own output tells the cause",
    "use another release of the engine": "another release of an engine",
    "do not use this engine for this model": "another engine: test_check_server.py checks one without the fault",
    "vllm or sglang, or remove serve_check": "another engine, which gets token ids: test_check_server.py",
    "evaluation/evaluate_model.py: list the names": "a list to choose from",
    "pip install 'longhaul[evaluate]' in the job environment": "installs packages",
    "pip install 'longhaul[evaluate]' where longhaul runs": "installs packages",
    "set tokenizer.chat_template in the config": "the data of such a stage are refused first: tokenize_dataset.py",
    "the checkpoint and model_config.json belong to different models: train the stage again": "another training",
    "Qwen3-MoE, DeepSeek V2 or DeepSeek V3 model": "another model; test_export_checkpoint.py exports these",
    "export a supported architecture": "another model; test_export_checkpoint.py exports these",
    "nothing was exported; the software is at fault, not the config": "a fault of longhaul or of transformers",
    "this transformers release does not read the layout that it writes": "another release of transformers",
    "this Python has no standard library on disk": "another Python",
    "give the job more memory or fewer CPUs": "a job that is killed for lack of memory",
    "convert it to tokenizer.json first": "another program, which depends on the tokenizer",
    "remove that text, or set allow_control_tokens: true": "no known tokenizer refuses such a text",
    "write one object per line as .jsonl: jq -c '.[]'": "a list of more than 1 GB; tried for a damaged list",
    "nothing to train on": "such conversations are left out and counted, and stop nothing",
}
"""A part of a remedy that no test can follow -> the reason."""


REMEDIES_OF_PLANS = ("config/", "planning/")
"""test_config_remedies.py scans these packages: there one table tries nearly all remedies."""


def remedies_to_follow() -> list[RemedyInSource]:
    """Return the remedies that must be in a table of this file or of test_remedies_about_files.py."""
    return [remedy for remedy in remedies_in_source() if not remedy.module.startswith(REMEDIES_OF_PLANS)]


def test_hints_in_constants_are_seen():
    assert "export/open_verified_checkpoint.py" in {remedy.module for remedy in remedies_in_source()}
    hint = ast.parse("f'{HINT} of {path}' if folder else HINT + ' now'", mode="eval").body
    assert texts_of(hint, {"HINT": ("move it",)}) == ("move it of {}", "move it now")


def test_hints_that_are_arguments_or_results_of_functions_are_seen():
    found = {str(remedy) for remedy in remedies_in_source()}
    assert "data/readers/conversations.py: use {role, content}" in found
    assert "scheduling/find_software.py: write the path of your {} into software of the site file" in found


def test_every_remedy_to_follow_is_in_the_table():
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
