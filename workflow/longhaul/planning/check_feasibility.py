"""Refuses a stage or dataset that cannot work: batch arithmetic, schedule, precision, offload, nodes, minutes, memory, quotas."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longhaul.config.dataset_config import Dataset
from longhaul.config.field_types import MAX_STEPS, HuggingFaceConfig
from longhaul.config.gpu_datasheets import datasheet, multiplies_in_fp8
from longhaul.config.model_size import ModelSize
from longhaul.config.parameter_counts import has_balancing_bias, sparse_layers
from longhaul.config.partition_config import Partition
from longhaul.config.run_config import Config, Storage
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.errors import InputError, UserError
from longhaul.planning.checkpoint_size import checkpoint_write_s
from longhaul.planning.constants_shared_with_trainer import COMPUTE_BYTES, FP8_MULTIPLE, SWAP_MIN_BYTES
from longhaul.planning.gpu_memory import MemoryEstimate, needed_gib
from longhaul.planning.memory_remedies import fitting_settings

_FILES_PER_CHUNK = 9  # .bin, .idx and mask of two splits, keys, record, folder


def accumulation_steps(stage: Stage, data_parallel: int) -> int:
    """Return the number of micro batches per rank and optimizer step; raise UserError if the global batch does not divide."""
    per_pass = stage.micro_batch_size * data_parallel
    if stage.global_batch_size % per_pass:
        raise UserError(
            f"stages.{stage.name}: global_batch_size {stage.global_batch_size} is not a multiple of micro_batch_size "
            f"{stage.micro_batch_size} x data parallel {data_parallel} = {per_pass}",
            f"use a global_batch_size of {max(1, stage.global_batch_size // per_pass) * per_pass}, or another micro_batch_size",
        )
    return stage.global_batch_size // per_pass


def check_vocabulary(config: Config, sizes: ModelSize) -> None:
    """Raise UserError if the trained tokenizer has more tokens than the model."""
    train = config.tokenizer.train
    if train and train.vocab_size > sizes.vocab_size:
        raise UserError(
            f"tokenizer.train.vocab_size {train.vocab_size} is larger than the model's vocab_size {sizes.vocab_size}",
            f"set tokenizer.train.vocab_size to at most {sizes.vocab_size}"
            + ("" if config.model.pretrained else ", or increase the model's vocab_size"),
        )


def check_schedule(stage: Stage) -> None:
    """Raise UserError if the learning-rate schedule has keys that do not fit its kind."""
    schedule, where = stage.schedule, f"stages.{stage.name}.schedule"
    if schedule.kind == "wsd" and schedule.decay_steps == 0:
        raise UserError(f"{where}: kind wsd needs decay_steps >= 1; it is 0", "use 10 to 20 % of the steps")
    if schedule.kind != "wsd" and schedule.decay_steps:
        raise UserError(
            f"{where}.decay_steps {schedule.decay_steps} has no effect with kind {schedule.kind}",
            "remove decay_steps, or use kind wsd",
        )
    shares = [length for length in (schedule.warmup_steps, schedule.decay_steps) if isinstance(length, float)]
    if sum(shares) > 1:
        raise UserError(
            f"{where}: warmup_steps {schedule.warmup_steps} + decay_steps {schedule.decay_steps} exceed the stage",
            "reduce them",
        )


def check_number_of_steps(stage: Stage, steps: int) -> None:
    """Raise UserError if a stage has too many steps, or too few for its learning-rate schedule or its profile.

    The training job calls it, too: only there the number of steps of a stage with `epochs` is known.
    """
    if steps > MAX_STEPS:
        key = "epochs" if stage.epochs else "tokens"
        raise InputError(
            f"stages.{stage.name}.{key} {getattr(stage, key)} are {steps} steps; a stage has at most {MAX_STEPS} steps",
            f"reduce {key}, or increase global_batch_size or sequence_length",
        )
    schedule = stage.schedule.in_steps(steps)
    if schedule.warmup_steps + schedule.decay_steps > steps:
        length = f"{steps} steps" + (f", which are {stage.epochs:g} epochs" if stage.epochs else "")
        raise InputError(
            f"stages.{stage.name}.schedule: warmup_steps {schedule.warmup_steps} + decay_steps {schedule.decay_steps} exceed "
            f"the stage's {length}",
            "reduce them, write them as shares of the steps such as 0.03, or train for more steps",
        )
    _check_profiled_steps(stage, steps)


def _check_profiled_steps(stage: Stage, steps: int) -> None:
    """Raise UserError if the stage is over before the last step of its profile."""
    if stage.profile_steps and stage.profile_steps[1] > steps:
        raise UserError(
            f"stages.{stage.name}.profile_steps {list(stage.profile_steps)} exceed the stage's {steps} steps",
            f"profile steps up to {steps}",
        )


def check_precision(stage: Stage, site: Site) -> None:
    """Raise UserError if the precision does not work with the site, the ZeRO stage or the loss."""
    if stage.precision == "fp16" and not site.node.gpus:
        raise UserError(
            f"stages.{stage.name}: precision fp16 on site {site.name}, which has no GPU: DeepSpeed's loss scaling needs GPUs",
            "set precision to bf16 or fp32",
        )
    if stage.precision == "fp8":
        _check_fp8(stage, site)
    if stage.precision != "fp32" and stage.zero.stage == 0:
        raise UserError(
            f"stages.{stage.name}: precision {stage.precision} with ZeRO stage 0 has no fp32 master weights, which changes the "
            "result",
            "set zero.stage to 1",
        )
    if stage.precision == "fp16" and stage.sequence_aux_loss_coef:
        raise UserError(
            f"stages.{stage.name}: sequence_aux_loss_coef {stage.sequence_aux_loss_coef:g} with precision fp16 is not supported",
            "set precision to bf16 or fp32",
        )


def _check_fp8(stage: Stage, site: Site) -> None:
    where = f"stages.{stage.name}: precision fp8"
    if not site.node.gpus:
        raise UserError(f"{where} on site {site.name}, which has no GPU", "set precision to bf16 or fp32")
    if site.accelerator.rocm:
        raise UserError(f"{where} on site {site.name}, which has AMD GPUs, is not supported", "set precision to bf16")
    gpu, peak = site.partition_for("gpu").gpu_type, site.node.gpu_peak_tflops
    if not multiplies_in_fp8(gpu, peak):
        which = f"of type {gpu}" if gpu and datasheet(gpu) else f"with gpu_peak_tflops {peak:g}"
        raise UserError(
            f"{where} on GPUs {which}, which do not multiply in FP8",
            "set precision to bf16, or use a partition with newer GPUs",
        )
    tokens = stage.micro_batch_size * stage.sequence_length // stage.parallel.sequence
    if tokens % FP8_MULTIPLE:
        raise UserError(
            f"{where} with {tokens} tokens for each rank and micro batch: FP8 units multiply multiples of {FP8_MULTIPLE}",
            f"make micro_batch_size times sequence_length a multiple of {FP8_MULTIPLE * stage.parallel.sequence}",
        )


def check_expert_balance(stage: Stage, model: HuggingFaceConfig) -> None:
    """Raise UserError for keys that balance experts, if the model has no experts, or no bias that the key could move."""
    has_experts = any(sparse_layers(model))
    if stage.sequence_aux_loss_coef and not has_experts:
        raise UserError(
            f"stages.{stage.name}.sequence_aux_loss_coef {stage.sequence_aux_loss_coef:g} has no effect: the model has no routed "
            "experts",
            "remove the key",
        )
    if stage.router_bias_update_rate and not (has_experts and has_balancing_bias(model)):
        raise UserError(
            f"stages.{stage.name}.router_bias_update_rate {stage.router_bias_update_rate:g} has no effect: "
            + ("routers of DeepSeek-V3 alone have this bias" if has_experts else "the model has no routed experts"),
            "remove the key" + (", or balance experts with sequence_aux_loss_coef" if has_experts else ""),
        )


def check_offload(stage: Stage, storage: Storage) -> None:
    """Raise UserError if an offload setting needs another ZeRO stage or another setting."""
    zero, where = stage.zero, f"stages.{stage.name}.zero"
    if zero.offload_optimizer == "cpu" and zero.stage == 0:
        raise UserError(f"{where}.offload_optimizer cpu needs ZeRO stage >= 1; it is 0", "set zero.stage to 1, 2 or 3")
    if zero.offload_param != "none" and zero.stage < 3:
        raise UserError(
            f"{where}.offload_param {zero.offload_param} needs ZeRO stage 3; it is {zero.stage} (DeepSpeed would ignore the key)",
            "set zero.stage to 3, or offload only the optimizer",
        )
    for key in zero.nvme_keys:
        _check_swapping(stage, storage, f"{where}.{key} nvme")
    if zero.offload_param == "nvme":
        _check_swapped_weights(stage, f"{where}.offload_param nvme")


def _check_swapping(stage: Stage, storage: Storage, where: str) -> None:
    if stage.zero.stage < 3:
        raise UserError(
            f"{where} needs ZeRO stage 3; it is {stage.zero.stage} (DeepSpeed would keep the states in CPU memory)",
            "set zero.stage to 3, or zero.offload_optimizer to cpu",
        )
    if storage.scratch is None:
        raise UserError(
            f"{where} needs storage.scratch, which is not set: longhaul never swaps to $TMPDIR or /tmp by default",
            "set storage.scratch to a folder on a local disk of every node",
        )
    if stage.precision == "fp16":
        raise UserError(f"{where} with precision fp16 is not supported", "set precision to bf16 or fp32")


def _check_swapped_weights(stage: Stage, where: str) -> None:
    if stage.zero.offload_optimizer == "none":
        raise UserError(
            f"{where} with offload_optimizer none is not supported: master weights need more GPU memory than the weights",
            "set zero.offload_optimizer to cpu or nvme",
        )
    if axes := [axis for axis, ranks in stage.parallel if ranks > 1]:
        ranks = getattr(stage.parallel, axes[0])
        raise UserError(f"{where} with parallel.{axes[0]} {ranks} is not supported", f"set parallel.{axes[0]} to 1")
    for key in ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance"):
        if value := getattr(stage.zero, key):
            raise UserError(
                f"{where} with {key} {value}: prefetched or kept weights would need more buffers than there are",
                f"remove {key}; with weights on disk it is always 0",
            )
    threshold, limit = stage.zero.stage3_param_persistence_threshold or 0, _largest_unswapped_tensor(stage)
    if threshold > limit:
        raise UserError(
            f"{where} with stage3_param_persistence_threshold {threshold}: a tensor with more than {limit} elements is swapped "
            "to disk and must be partitioned",
            f"set stage3_param_persistence_threshold to at most {limit}, or remove it",
        )


def _largest_unswapped_tensor(stage: Stage) -> int:
    """Return the elements of the largest tensor that DeepSpeed does not swap on any rank (its method swappable_tensor)."""
    ranks = stage.nodes * stage.gpus_per_node
    return ranks * (SWAP_MIN_BYTES // COMPUTE_BYTES[stage.precision] - 1)


def check_site(stage: Stage, site: Site) -> None:
    """Raise UserError if the site does not have the stage's nodes, ranks or minutes."""
    where, partition = f"stages.{stage.name}", site.partition_for("gpu")
    _check_nodes_and_ranks(where, stage.nodes, stage.gpus_per_node, site, partition)
    _check_minutes(f"{where}.minutes", stage.minutes, partition)


def check_job_limits(config: Config, site: Site) -> None:
    """Raise UserError if the site does not have the resources of the checks or of the data jobs.

    Minutes are checked only if the config sets them; a default is reduced to the partition's limit.
    """
    checks = config.checks
    _check_nodes_and_ranks("checks", checks.nodes or 1, checks.gpus_per_node or 1, site, site.partition_for("debug"))
    if "minutes" in checks.model_fields_set:
        _check_minutes("checks.minutes", checks.minutes, site.partition_for("debug"))
    if "minutes" in config.scale_test.model_fields_set:
        _check_minutes("scale_test.minutes", config.scale_test.minutes, site.partition_for("gpu"))
    if "data_minutes" in config.model_fields_set:
        _check_minutes("data_minutes", config.data_minutes, site.partition_for("cpu"))


def data_minutes_warning(config: Config, site: Site) -> str | None:
    """Return a warning if the time limit of the data jobs is the default, and the partition cuts it."""
    partition = site.partition_for("cpu")
    limit = partition.max_minutes
    if "data_minutes" in config.model_fields_set or not limit or config.data_minutes <= limit:
        return None
    return (
        f"{partition.title} allows {limit} minutes, less than the usual {config.data_minutes} of data_minutes: a job that "
        f"tokenizes or exports for longer is stopped; give the jobs cpu a partition with more, or set data_minutes to {limit} "
        "if it is enough"
    )


def _check_minutes(key: str, minutes: int, partition: Partition) -> None:
    if partition.max_minutes and minutes > partition.max_minutes:
        raise UserError(
            f"{key} {minutes}: {partition.title} allows {partition.max_minutes}",
            f"use at most {partition.max_minutes} minutes",
        )


def _check_nodes_and_ranks(where: str, nodes: int, gpus_per_node: int, site: Site, partition: Partition) -> None:
    node = partition.node
    if node.gpus and gpus_per_node > node.gpus:
        raise UserError(
            f"{where}.gpus_per_node {gpus_per_node}: site {site.name} has {node.gpus} GPUs per node in {partition.title}",
            f"use at most {node.gpus}" + (", on more nodes" if partition.max_nodes > nodes else ""),
        )
    if not node.gpus and gpus_per_node > node.cpus:
        raise UserError(
            f"{where}.gpus_per_node {gpus_per_node}: site {site.name} has {node.cpus} CPU cores per node and no GPU in "
            f"{partition.title}",
            f"use at most {node.cpus}: each process needs one core",
        )
    if nodes > partition.max_nodes:
        raise UserError(
            f"{where}.nodes {nodes}: site {site.name} allows {partition.max_nodes} in {partition.title}",
            f"use at most {partition.max_nodes} nodes, or correct max_nodes of the partition in the site file",
        )


def check_save_time(stage: Stage, save_bytes: int, site: Site) -> None:
    """Raise UserError if an allocation ends before a checkpoint can be saved."""
    save_s, stop_margin_s = checkpoint_write_s(save_bytes, site), stage.recovery.stop_margin_s
    if save_s + stop_margin_s >= 60 * stage.minutes:
        enough, rest_s = math.floor((save_s + stop_margin_s) / 60) + 1, math.ceil(60 * stage.minutes - save_s) - 1
        raise UserError(
            f"stages.{stage.name}.minutes {stage.minutes}: a save of {save_bytes / 1e9:.1f} GB takes about {save_s:.0f} s, and "
            f"recovery.stop_margin_s is {stop_margin_s:g} s: no checkpoint can be saved before the allocation ends",
            f"set minutes to {enough} or more"
            + (f", or recovery.stop_margin_s to at most {rest_s}" if rest_s >= 0 else ""),
        )


def save_time_warning(stage: Stage, save_bytes: int, site: Site) -> str | None:
    """Return a warning if the first save takes longer than the reserve at the end of an allocation."""
    save_s, stop_margin_s = checkpoint_write_s(save_bytes, site), stage.recovery.stop_margin_s
    if save_s <= stop_margin_s:
        return None
    return (
        f"stages.{stage.name}: a save of {save_bytes / 1e9:.1f} GB takes about {save_s:.0f} s, longer than "
        f"recovery.stop_margin_s {stop_margin_s:g}: the end of an allocation may interrupt the first save, whose time is not "
        "measured yet"
    )


def not_compiled_warning(stage: Stage, sizes: ModelSize | None, site: Site) -> str | None:
    """Return a warning if the layers run without torch.compile on the GPUs of the site, although the config asks for it."""
    reason = stage.why_not_compiled(has_experts=bool(sizes and sizes.routed_experts))
    if not site.node.gpus or stage.compile == "off" or reason is None:
        return None
    return f"stages.{stage.name}: its layers run without torch.compile: {reason}"


def deterministic_warning(stage: Stage, site: Site) -> str | None:
    """Return a warning if a stage asks for deterministic kernels on AMD GPUs."""
    if not stage.deterministic or not site.accelerator.rocm:
        return None
    return f"stages.{stage.name}.deterministic: tested on NVIDIA GPUs only; no test shows that kernels of ROCm repeat their bits"


def check_positions(stage: Stage, sizes: ModelSize) -> None:
    """Raise UserError if sequences are longer than the model allows."""
    if stage.sequence_length > sizes.positions:
        raise UserError(
            f"stages.{stage.name}.sequence_length {stage.sequence_length} exceeds the model's "
            f"max_position_embeddings {sizes.positions}",
            f"use at most {sizes.positions}, or increase max_position_embeddings",
        )


def check_memory(stage: Stage, memory: MemoryEstimate, sizes: ModelSize, site: Site) -> None:
    """Raise UserError if the model states alone are larger than the memory of a GPU."""
    limit = site.node.gpu_memory_gib
    if limit and memory.model_states > limit * 2**30:
        raise UserError(
            f"stages.{stage.name}: weights, gradients and optimizer states need {needed_gib(memory.model_states)} GiB per GPU; "
            f"site {site.name} has {limit:g} GiB",
            fitting_settings(stage, sizes, site, lambda other: other.model_states <= limit * 2**30),
        )


def memory_warning(stage: Stage, memory: MemoryEstimate | None, sizes: ModelSize | None, site: Site) -> str | None:
    """Return a warning if a stage needs more than the memory of a GPU by the estimate, which is within a few percent."""
    limit = site.node.gpu_memory_gib
    if not (limit and memory and sizes) or memory.total <= limit * 2**30:
        return None
    remedy = fitting_settings(stage, sizes, site, lambda other: other.total <= limit * 2**30)
    return (
        f"stages.{stage.name} needs about {needed_gib(memory.total)} GiB per GPU; site {site.name} has {limit:g} GiB: it will "
        f"probably run out of memory. {remedy[0].upper()}{remedy[1:]}"
    )


def check_checkpoint_files(stage: Stage, files: int, site: Site) -> None:
    """Raise UserError if the kept checkpoints have more files than the site's quota; `files` is the number in one checkpoint."""
    kept, limit = stage.checkpoints.keep_last + stage.checkpoints.keep_best + 1, site.inode_limit
    if limit and files * kept > limit:
        most = limit // files - 1  # without the one that is written
        raise UserError(
            f"stages.{stage.name}: {kept} checkpoints with {files} files each exceed site {site.name}'s inode_limit {limit}",
            f"keep at most {most} checkpoints: checkpoints.keep_last + checkpoints.keep_best"
            if most >= 1
            else f"two checkpoints need {2 * files} files: use fewer ranks, or ask for a larger quota and set inode_limit",
        )


def check_chunk_files(name: str, dataset: Dataset, file_sizes: Sequence[int], site: Site) -> None:
    """Raise UserError if a dataset's chunks have more files than the site's quota; small sources share chunks."""
    chunk_bytes = dataset.chunk_mb * 1e6
    large = sum(math.ceil(size / chunk_bytes) for size in file_sizes if size >= chunk_bytes)
    chunks = large + math.ceil(sum(size for size in file_sizes if size < chunk_bytes) / chunk_bytes)
    files = chunks * _FILES_PER_CHUNK
    if site.inode_limit and files > site.inode_limit:
        chunk_mb = math.ceil(dataset.chunk_mb * files / site.inode_limit)
        raise UserError(
            f"datasets.{name}: {chunks} chunks of {dataset.chunk_mb:g} MB need up to {files} files; site {site.name}'s "
            f"inode_limit is {site.inode_limit}",
            f"set chunk_mb to {chunk_mb} or more",
        )
