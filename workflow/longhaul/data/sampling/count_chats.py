"""Runs the job that counts what sft stages keep of a dataset's conversations, and refuses stages that keep none."""

from __future__ import annotations

import sys
from pathlib import Path

from longhaul.artifacts.artifact_schemas import ConversationCounts, DataManifest, KeptConversations
from longhaul.artifacts.compare_hashes import damaged_data, dataset_files, wrong_files
from longhaul.config.stage_config import Truncate
from longhaul.data.sampling.kept_conversations import count_conversations, left_out_lines, require_kept_conversations
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.jobs.kinds.count_chats_job import CountChatsSpec


def run(job: CountChatsSpec) -> None:
    """Write `job.out`.

    Raises:
        UserError: a file of lengths or masks is missing or was altered.
        InputError: a stage would keep no conversation of a split. Its training would find the same, maybe weeks later.
    """
    manifest = DataManifest.read(Path(job.data))
    _verify_counted_files(job, manifest)
    splits = {split: _count_split(job, manifest, split) for split in manifest.splits}
    ConversationCounts(manifest.hash, splits).write(Path(job.out))


def _verify_counted_files(job: CountChatsSpec, manifest: DataManifest) -> None:
    """Compare the files with their hashes, without the tokens (.bin): these are by far the most, and are not counted."""
    files = {path: sha256 for path, sha256 in dataset_files(manifest).items() if path.suffix != ".bin"}
    if problem := next(wrong_files(files), None):
        raise damaged_data(problem, manifest, Path(job.data))


def _count_split(job: CountChatsSpec, manifest: DataManifest, split: str) -> list[KeptConversations]:
    reader = SplitReader(Path(manifest.path), manifest.splits[split], with_mask=True)
    if not reader.document_count:
        return []
    counted: dict[tuple[int, Truncate], KeptConversations] = {}
    for stage in job.stages:
        settings = stage.sequence_length, stage.truncate
        if settings not in counted:
            counted[settings] = count_conversations(reader, *settings).totals
        where = f"stage {stage.name}: dataset {manifest.dataset}"
        require_kept_conversations(counted[settings], stage.truncate, split, where)
        for line in left_out_lines(counted[settings]):
            print(f"{where}, split {split}: {line}", file=sys.stderr, flush=True)
    return list(counted.values())
