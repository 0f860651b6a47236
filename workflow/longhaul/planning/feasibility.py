"""Batch arithmetic of a stage, and every combination that is refused before anything is submitted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longhaul.config.dataset_config import Dataset
from longhaul.config.model_size import ModelSize
from longhaul.config.run_config import Config, Parallel, Stage, Storage
from longhaul.config.site_config import Partition, Site
from longhaul.errors import UserError
from longhaul.planning.allocations import partition_for
from longhaul.planning.gpu_memory import COMPUTE_BYTES, SWAPPED_BYTES, Memory

_FILES_PER_UNIT = 9  # bin, idx and mask of two splits, keys, record, folder


def accumulation(stage: Stage, data_parallel: int) -> int:
    per_pass = stage.micro_batch_size * data_parallel
    if stage.global_batch_size % per_pass:
        raise UserError(
            f"stages.{stage.name}: global_batch_size {stage.global_batch_size} is not a multiple of micro_batch_size "
            f"{stage.micro_batch_size} x data parallel {data_parallel} = {per_pass}",
            f"use a global_batch_size of {max(1, stage.global_batch_size // per_pass) * per_pass}, or another micro_batch_size",
        )
    return stage.global_batch_size // per_pass


def check_vocabulary(config: Config, sizes: ModelSize) -> None:
    train = config.tokenizer.train
    if train and train.vocab_size > sizes.vocab_size:
        raise UserError(
            f"tokenizer.train.vocab_size {train.vocab_size} is larger than the model's vocab_size {sizes.vocab_size}",
            f"train at most {sizes.vocab_size} tokens, or enlarge the model's vocab_size",
        )


def check_schedule(stage: Stage, steps: int) -> None:
    schedule, where = stage.schedule, f"stages.{stage.name}.schedule"
    if schedule.kind == "wsd" and schedule.decay_steps == 0:
        raise UserError(f"{where}: wsd needs decay_steps >= 1", "10 to 20 % of the steps is usual")
    if schedule.kind != "wsd" and schedule.decay_steps:
        raise UserError(
            f"{where}.decay_steps {schedule.decay_steps} has no meaning for {schedule.kind}", "drop it, or use wsd"
        )
    if schedule.warmup_steps + schedule.decay_steps > steps:
        raise UserError(
            f"{where}: warmup_steps {schedule.warmup_steps} + decay_steps {schedule.decay_steps} exceed the stage's "
            f"{steps} steps",
            "shorten them, or train longer",
        )


def check_precision(stage: Stage, site: Site) -> None:
    if stage.precision == "fp16" and not site.node.gpus:
        raise UserError(
            f"stages.{stage.name}: precision fp16 on site {site.name}, which has no GPU: loss scaling is DeepSpeed's for GPUs",
            "set precision to bf16 or fp32",
        )
    if stage.precision != "fp32" and stage.zero.stage == 0:
        raise UserError(
            f"stages.{stage.name}: precision {stage.precision} with ZeRO stage 0 keeps no fp32 master weights and trains "
            "to other numbers",
            "set zero.stage to 1",
        )
    if stage.precision == "fp16" and stage.sequence_aux_loss_coef:
        raise UserError(
            f"stages.{stage.name}: sequence_aux_loss_coef {stage.sequence_aux_loss_coef:g} with fp16 is not proved here",
            "use bf16 or fp32",
        )


def check_offload(stage: Stage, storage: Storage) -> None:
    zero, where = stage.zero, f"stages.{stage.name}.zero"
    if zero.offload_optimizer == "cpu" and zero.stage == 0:
        raise UserError(f"{where}.offload_optimizer needs stage >= 1; it is 0", "set stage to 1, 2 or 3")
    if zero.offload_param != "none" and zero.stage < 3:
        raise UserError(
            f"{where}.offload_param needs stage 3; it is {zero.stage} (DeepSpeed would ignore it in silence)",
            "set stage to 3, or offload the optimizer only",
        )
    for key in zero.on_disk:
        _check_swapping(stage, storage, f"{where}.{key} nvme")
    if zero.offload_param == "nvme":
        _check_swapped_weights(stage, f"{where}.offload_param nvme")


def _check_swapping(stage: Stage, storage: Storage, where: str) -> None:
    if stage.zero.stage < 3:
        raise UserError(
            f"{where} needs stage 3; it is {stage.zero.stage} (DeepSpeed would keep the states in CPU memory, in silence)",
            "set stage to 3, or offload_optimizer to cpu",
        )
    if storage.scratch is None:
        raise UserError(
            f"{where} needs storage.scratch: nothing is written to $TMPDIR or /tmp unasked",
            "set storage.scratch to a folder on a local disk of every node",
        )
    if stage.precision == "fp16":
        raise UserError(f"{where} with fp16 is not proved here", "use bf16 or fp32")


def _check_swapped_weights(stage: Stage, where: str) -> None:
    if stage.zero.offload_optimizer == "none":
        raise UserError(
            f"{where} with the optimizer on the GPU is not proved here: masters take more of it than the weights do",
            "set offload_optimizer to cpu or nvme",
        )
    if axes := [axis for axis, ranks in stage.parallel if ranks > 1]:
        raise UserError(f"{where} with {axes[0]} parallelism is not proved here", f"set parallel.{axes[0]} to 1")
    for key in ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance"):
        if value := getattr(stage.zero, key):
            raise UserError(
                f"{where} with {key} {value}: weights that are gathered ahead or kept take more buffers than there are",
                f"leave {key} out: it is 0 where weights lie on a disk",
            )
    kept, limit = stage.zero.stage3_param_persistence_threshold or 0, _largest_in_memory(stage)
    if kept > limit:
        raise UserError(
            f"{where} with stage3_param_persistence_threshold {kept}: a tensor of more than {limit} elements lies on the disk, "
            "and cannot stay whole, too",
            f"set stage3_param_persistence_threshold to at most {limit}, or leave it out",
        )


def _largest_in_memory(stage: Stage) -> int:
    """Elements of the largest tensor of which DeepSpeed swaps no rank's part (`swappable_tensor`)."""
    ranks = stage.nodes * stage.gpus_per_node
    return ranks * (SWAPPED_BYTES // COMPUTE_BYTES[stage.precision] - 1)


def check_site(stage: Stage, site: Site) -> None:
    where, partition = f"stages.{stage.name}", partition_for(site, "gpu")
    _check_size(where, stage.nodes, stage.gpus_per_node, site, partition)
    _check_minutes(f"{where}.minutes", stage.minutes, partition)


def check_checks(config: Config, site: Site) -> None:
    """Of the checks' and the data's allocations. A default that a partition does not allow is cut to what it does."""
    checks = config.checks
    _check_size("checks", checks.nodes or 1, checks.gpus_per_node or 1, site, partition_for(site, "debug"))
    if "minutes" in checks.model_fields_set:
        _check_minutes("checks.minutes", checks.minutes, partition_for(site, "debug"))
    if "data_minutes" in config.model_fields_set:
        _check_minutes("data_minutes", config.data_minutes, partition_for(site, "cpu"))


def _check_minutes(key: str, minutes: int, partition: Partition | None) -> None:
    if partition and minutes > partition.max_minutes:
        raise UserError(
            f"{key} {minutes}: partition {partition.name} allows {partition.max_minutes}",
            f"use at most {partition.max_minutes} minutes",
        )


def checkpoint_bytes(stage: Stage, sizes: ModelSize) -> int:
    """Of one save: fp32 masters, two moments, and the weights in compute precision."""
    return (12 + COMPUTE_BYTES[stage.precision]) * sizes.total


def check_lead(stage: Stage, save_bytes: int, site: Site) -> str:
    """A warning, or ""; refuses an allocation that ends before a save could."""
    where, stop_margin_s = f"stages.{stage.name}", stage.recovery.stop_margin_s
    save_s = save_bytes / (site.checkpoint_write_gb_per_s * 1e9) if site.checkpoint_write_gb_per_s else 0.0
    if save_s + stop_margin_s >= 60 * stage.minutes:
        raise UserError(
            f"{where}.minutes {stage.minutes}: a save of {save_bytes / 1e9:.1f} GB takes about {save_s:.0f} s, and "
            f"recovery.stop_margin_s is {stop_margin_s:g}: nothing that is trained could be saved",
            "give the stage more minutes, or lower recovery.stop_margin_s",
        )
    if save_s > stop_margin_s:
        return (
            f"{where}: a save of {save_bytes / 1e9:.1f} GB takes about {save_s:.0f} s, longer than recovery.stop_margin_s "
            f"{stop_margin_s:g}: until one was measured, the end of an allocation may cut it off"
        )
    return ""


def _check_size(where: str, nodes: int, gpus_per_node: int, site: Site, partition: Partition | None) -> None:
    if site.node.gpus and gpus_per_node > site.node.gpus:
        raise UserError(
            f"{where}.gpus_per_node {gpus_per_node}: site {site.name} has {site.node.gpus} GPUs a node",
            "use more nodes with fewer GPUs each",
        )
    if not site.node.gpus and gpus_per_node > site.node.cpus:
        raise UserError(
            f"{where}.gpus_per_node {gpus_per_node}: site {site.name} has {site.node.cpus} CPUs a node and no GPU",
            "one process needs at least one CPU",
        )
    most = min(site.max_nodes, (partition.max_nodes if partition else None) or site.max_nodes)
    if nodes > most:
        raise UserError(f"{where}.nodes {nodes}: site {site.name} allows {most}", f"use at most {most} nodes")


def check_positions(stage: Stage, sizes: ModelSize) -> None:
    if stage.sequence_length > sizes.positions:
        raise UserError(
            f"stages.{stage.name}.sequence_length {stage.sequence_length} exceeds the model's "
            f"max_position_embeddings {sizes.positions}",
            f"use at most {sizes.positions}, or enlarge the positions",
        )


def check_memory(stage: Stage, memory: Memory, site: Site) -> None:
    limit = site.node.gpu_memory_gib
    if limit and memory.states > limit * 2**30:
        raise UserError(
            f"stages.{stage.name}: weights, gradients and optimizer alone take {memory.states / 2**30:.1f} GiB per GPU; "
            f"site {site.name} has {limit:g} GiB",
            "raise zero.stage, offload to the CPU, or use more GPUs",
        )


def files_per_checkpoint(stage: Stage, world_size: int, exportable: bool) -> int:
    """Files of one save, at most: DeepSpeed's model and optimizer states, one trainer state per rank, state, manifest, proof.

    Each stage of a pipeline has a file beside the embedding's and the head's; split models have a layout and buffers.
    """
    parallel = stage.parallel
    model = world_size if stage.zero.stage == 3 else parallel.tensor * parallel.pipeline
    optimizer = world_size if stage.zero.stage >= 1 else 0
    layers = (parallel.pipeline + 2) * parallel.tensor if parallel.pipeline > 1 and parallel.expert == 1 else 0
    split = 1 + parallel.pipeline if parallel.model_copy(update={"sequence": 1}) != Parallel() else 0
    return model + layers + optimizer + split + world_size + 2 + (3 if exportable else 0)


def check_inodes(stage: Stage, files: int, site: Site) -> None:
    kept = stage.checkpoints.keep_last + stage.checkpoints.keep_best + 1
    if site.inode_limit and files * kept > site.inode_limit:
        raise UserError(
            f"stages.{stage.name}: {kept} checkpoints of {files} files exceed site {site.name}'s inode_limit "
            f"{site.inode_limit}",
            "keep fewer checkpoints",
        )


def check_unit_files(name: str, dataset: Dataset, sizes_bytes: Sequence[int], site: Site) -> None:
    """Files of a dataset's work units: small sources taken together."""
    unit_bytes = dataset.chunk_mb * 1e6
    large = sum(math.ceil(size / unit_bytes) for size in sizes_bytes if size >= unit_bytes)
    units = large + math.ceil(sum(size for size in sizes_bytes if size < unit_bytes) / unit_bytes)
    files = units * _FILES_PER_UNIT
    if site.inode_limit and files > site.inode_limit:
        chunk_mb = math.ceil(dataset.chunk_mb * files / site.inode_limit)
        raise UserError(
            f"datasets.{name}: {units} work units of {dataset.chunk_mb:g} MB are up to {files} files, more than site "
            f"{site.name}'s inode_limit {site.inode_limit}",
            f"set chunk_mb to {chunk_mb} or more",
        )
