"""Mistakes of users: one clear message with a remedy, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chain import REPOSITORY
from configs import CHAT, LLAMA, STAGE, write_config
from corpora import conversation, dataset, make_tokenizer, text, tokenize_job, tokenizer_job, write_jsonl
from longhaul.cli import main
from longhaul.jobs import Job


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs one verb, which must end with exit code 2; its message, which must name a remedy."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    output = capsys.readouterr()
    assert ended.value.code == 2, output.err
    assert output.err.startswith("error: ") and "\n  remedy: " in output.err, output.err
    assert "Traceback" not in output.err + output.out
    return output.err


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def stages(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**STAGE, **change} for change in changes]


MIXTURE = {
    **LLAMA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

# (what is wrong, changes of the config, changes of the site, what the message says)
CONFIGS: list[tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ("misspelt key", {"datsets": {}}, {}, ("datsets is not a known key", "did you mean datasets?")),
    ("misspelt stage key", {"stages.0.gradient_cliping": 1}, {}, ("stages.0.gradient_cliping", "known key")),
    (
        "misspelt nested key",
        {"stages.0.optimizer": {"gradient_cliping": 1.0}},
        {},
        ("stages.0.optimizer.gradient_cliping", "did you mean gradient_clipping?"),
    ),
    (
        "misspelt ZeRO key",
        {"stages.0.zero": {"overlap_com": True}},
        {},
        ("stages.0.zero.overlap_com", "did you mean overlap_comm?"),
    ),
    (
        "misspelt model key",
        {"model.llama.num_hiden_layers": 2},
        {},
        ("num_hiden_layers", "did you mean num_hidden_layers?"),
    ),
    ("missing key", {"run": ...}, {}, ("run is missing",)),
    ("missing model size", {"model.llama.hidden_size": ...}, {}, ("model.llama.hidden_size is missing",)),
    ("text for a number", {"stages.0.steps": "ten"}, {}, ("stages.0.steps is 'ten'", "valid integer")),
    ("number for a switch", {"stages.0.restart": 1}, {}, ("restart is 1", "boolean")),
    ("fraction for a count", {"stages.0.global_batch": 8.5}, {}, ("stages.0.global_batch is 8.5", "integer")),
    ("zero steps", {"stages.0.steps": 0}, {}, ("stages.0.steps is 0", "greater than or equal to 1")),
    ("negative rate", {"stages.0.optimizer": {"lr": -1.0}}, {}, ("stages.0.optimizer.lr is -1.0", "greater than 0")),
    (
        "unknown precision",
        {"stages.0.precision": "fp8"},
        {},
        ("stages.0.precision is 'fp8'", "'fp32', 'bf16' or 'fp16'"),
    ),
    ("unknown kind", {"stages.0.kind": "dpo"}, {}, ("stages.0.kind is 'dpo'", "'pretrain' or 'sft'")),
    ("share of one", {"datasets.prose.validation_share": 1.0}, {}, ("validation_share is 1.0", "less than 1")),
    ("steps and tokens", {"stages.0.tokens": 100}, {}, ("exactly one of steps, tokens", "steps and tokens")),
    ("no length", {"stages.0.steps": ...}, {}, ("exactly one of steps, tokens", "none")),
    ("two sources", {"datasets.prose.files": ["a.txt"]}, {}, ("exactly one of files, hub, python_stdlib, mixture",)),
    (
        "mixture of nothing known",
        {"datasets.m": {"kind": "text", "mixture": {"prose": 1, "x": 1}}},
        {},
        ("datasets.m.mixture: there is no dataset 'x'",),
    ),
    (
        "mixture of two kinds",
        {"datasets.m": {"kind": "text", "mixture": {"chats": 1}}},
        {},
        ("chats is chat, m is text",),
    ),
    ("weights too fine", {"datasets.m": {"kind": "text", "mixture": {"prose": 1, "x": 1e-6}}}, {}, ("round them",)),
    (
        "half a pair of columns",
        {"datasets.chats.columns": {"prompt": "p"}},
        {},
        ("prompt and completion belong together",),
    ),
    ("two models", {"model.pretrained": {"path": "m"}}, {}, ("exactly one of llama", "llama and pretrained")),
    ("path in the run's name", {"run": "../elsewhere"}, {}, ("run is '../elsewhere'",)),
    ("path in a stage's name", {"stages.0.name": "a/b"}, {}, ("stages.0.name is 'a/b'",)),
    ("path in a dataset's name", {"datasets.a/b": {"kind": "text", "python_stdlib": {}}}, {}, ("a/b",)),
    ("line break in a name", {"stages.0.name": "base\n#SBATCH"}, {}, ("stages.0.name",)),
    ("line break in a path", {"storage": {"weights": "/a\nb"}}, {}, ("storage.weights",)),
    ("no stages", {"stages": []}, {}, ("stages is []", "at least 1")),
    ("a stage twice", {"stages": stages({}, {})}, {}, ("stages: base is there twice",)),
    (
        "from nowhere",
        {"stages.1.from.stage": "bse"},
        {},
        ("stages.chat.from.stage: there is no stage 'bse'", "base, chat"),
    ),
    (
        "a cycle",
        {"stages": stages({"name": "a", "from": {"stage": "b"}}, {"name": "b", "from": {"stage": "a"}})},
        {},
        ("a <- b <- a is a cycle",),
    ),
    ("unknown dataset", {"stages.0.dataset": "pros"}, {}, ("there is no dataset 'pros'", "prose, chats")),
    ("text for sft", {"stages": [{**CHAT, "from": None, "dataset": "prose"}]}, {}, ("sft needs a chat dataset",)),
    ("no such file", {"datasets.prose": {"kind": "text", "files": ["no/*.txt"]}}, {}, ("nothing matches 'no/*.txt'",)),
    ("tokenizer of an unknown dataset", {"tokenizer.train.datasets": ["x"]}, {}, ("there is no dataset 'x'",)),
    ("no tokenizer there", {"tokenizer": {"path": "nowhere"}}, {}, ("nowhere holds no tokenizer.json",)),
    ("no such model folder", {"model": {"pretrained": {"path": "nowhere"}}}, {}, ("model.pretrained.path", "nowhere")),
    (
        "tokenizer beyond the vocabulary",
        {"tokenizer.train.vocab_size": 500},
        {},
        ("vocab_size 500 is larger than the model's vocab_size 400",),
    ),
    (
        "batch that does not divide",
        {"stages.0.micro_batch": 3},
        {},
        ("global_batch 8 is not a multiple", "= 3", "of 6"),
    ),
    ("warm-up beyond the end", {"stages.0.schedule": {"warmup_steps": 11}}, {}, ("warmup_steps 11", "10 steps")),
    ("wsd without decay", {"stages.0.schedule": {"kind": "wsd"}}, {}, ("wsd needs decay_steps >= 1",)),
    ("decay without wsd", {"stages.0.schedule": {"decay_steps": 2}}, {}, ("decay_steps 2 has no meaning for cosine",)),
    ("bf16 at ZeRO 0", {"stages.0.zero": {"stage": 0}, "stages.0.precision": "bf16"}, {}, ("bf16 with ZeRO stage 0",)),
    (
        "offload at ZeRO 0",
        {"stages.0.zero": {"stage": 0, "offload_optimizer": "cpu"}},
        {},
        ("offload_optimizer needs stage >= 1",),
    ),
    (
        "parameters offloaded at ZeRO 1",
        {"stages.0.zero": {"offload_param": "cpu"}},
        {},
        ("offload_param needs stage 3; it is 1",),
    ),
    ("ZeRO 4", {"stages.0.zero": {"stage": 4}}, {}, ("stages.0.zero.stage is 4", "less than or equal to 3")),
    (
        "sequence beyond the positions",
        {"stages.0.sequence_length": 256},
        {},
        ("256 exceeds", "max_position_embeddings 128"),
    ),
    ("more GPUs than a node has", {"stages.0.gpus_per_node": 16}, {}, ("gpus_per_node 16: site centre has 8 GPUs",)),
    ("more nodes than the site has", {"stages.0.nodes": 17}, {}, ("nodes 17: site centre allows 16",)),
    ("checks on more nodes than the site has", {"checks.nodes": 17}, {}, ("checks.nodes 17: site centre allows 16",)),
    (
        "checks on more GPUs than a node has",
        {"checks.gpus_per_node": 9},
        {},
        ("checks.gpus_per_node 9: site centre has 8 GPUs",),
    ),
    ("longer than the partition allows", {"stages.0.minutes": 1441}, {}, ("minutes 1441: partition gpu allows 1440",)),
    (
        "more memory than a GPU has",
        {"model.llama.num_hidden_layers": 10_000},
        {"node.gpu_memory_gib": 1},
        ("GiB per GPU", "site centre has 1 GiB"),
    ),
    ("more files than the quota", {}, {"inode_limit": 5}, ("exceed site centre's inode_limit 5",)),
    (
        "more work units than the quota",
        {"datasets.chats": {"kind": "chat", "files": [str(REPOSITORY / "docs" / "config.md")], "unit_mb": 0.001}},
        {"inode_limit": 150},
        (
            "datasets.chats: ",
            " work units of 0.001 MB are up to ",
            "site centre's inode_limit 150",
            "set unit_mb to 1 or more",
        ),
    ),
    (
        "evaluation files that are not there",
        {"datasets.chats.decontaminate": {"files": ["evals/*.jsonl"]}},
        {},
        ("datasets.chats.decontaminate.files: nothing matches 'evals/*.jsonl'",),
    ),
    (
        "a mixture that is to be screened",
        {"datasets.both": {"kind": "chat", "mixture": {"chats": 1}, "deduplicate": "near"}},
        {},
        ("datasets.both", "a mixture takes its parts as they are"),
    ),
    (
        "best without validation",
        {"stages.1.export": "best", "datasets.chats.validation_share": 0.0},
        {},
        ("best checkpoint is asked for", "validation_share 0"),
    ),
    (
        "best that is not kept",
        {"stages.1.export": "best", "stages.1.checkpoints": {"keep_best": 0}},
        {},
        ("keep_best is 0",),
    ),
    ("heads that do not divide", {"model.llama.num_key_value_heads": 3}, {}, ("4 is not a multiple of", "3")),
    ("unknown site", {"site": "moon"}, {}, ("there is no site 'moon'", "local, slurm-generic")),
    ("missing site file", {"site": "./moon.yaml"}, {}, ("moon.yaml does not exist",)),
    ("misspelt site key", {}, {"interconect": {}}, ("interconect is not a known key", "did you mean interconnect?")),
    ("Slurm without partitions", {}, {"partitions": ...}, ("scheduler slurm needs partitions",)),
    ("container without image", {}, {"software": {"kind": "container"}}, ("kind container needs path",)),
    ("shell in an account", {}, {"account": "a; rm -rf b"}, ("account is 'a; rm -rf b'",)),
    ("sbatch option in a partition", {}, {"partitions.gpu.name": "gpu\n#SBATCH --exclusive"}, ("partitions.gpu.name",)),
    ("shell in a variable's name", {}, {"environment": {"A;touch b": "1"}}, ("environment.A;touch b",)),
    ("line break in a variable", {}, {"environment": {"A": "1\n2"}}, ("environment.A",)),
    ("shell in an srun option", {}, {"srun_extra": ["--mpi=$(id)"]}, ("srun_extra.0 is '--mpi=$(id)'",)),
    (
        "axes beyond the ranks",
        {"stages.0.parallel": {"tensor": 2, "pipeline": 2}, "stages.0.gpus_per_node": 2},
        {},
        ("tensor 2 x pipeline 2 x sequence 1 = 4 does not divide the 2 ranks", "a product of 1 or 2"),
    ),
    (
        "heads that tensor ranks cannot share",
        {"stages.0.parallel": {"tensor": 4}, "stages.0.gpus_per_node": 4},
        {},
        ("tensor 4 does not divide the model's num_key_value_heads 2", "set tensor to 1 or 2"),
    ),
    (
        "a vocabulary that tensor ranks cannot share",
        {"model.llama.vocab_size": 401, "stages.0.parallel": {"tensor": 2}, "stages.0.gpus_per_node": 2},
        {},
        ("tensor 2 does not divide the model's vocab_size 401", "pad vocab_size"),
    ),
    *(
        (
            f"PowerSGD with {what}",
            {"stages.0.communication": {"powersgd": {}}, "stages.0.gpus_per_node": 2, **keys},
            {},
            says,
        )
        for what, keys, says in (
            ("ZeRO 2", {"stages.0.zero": {"stage": 2}}, ("powersgd with ZeRO stage 2", "set zero.stage to 1")),
            ("offload", {"stages.0.zero": {"offload_optimizer": "cpu"}}, ("offloaded optimizer is not proved here",)),
            ("fp16", {"stages.0.precision": "fp16"}, ("powersgd with fp16", "use bf16 or fp32")),
            ("one rank", {"stages.0.gpus_per_node": 1}, ("one data-parallel rank", "use more ranks")),
            (
                "tensor ranks",
                {"stages.0.parallel": {"tensor": 2}},
                ("powersgd with parallel.tensor 2", "set tensor to 1"),
            ),
            ("stages", {"stages.0.parallel": {"pipeline": 2}}, ("powersgd with parallel.pipeline 2",)),
            (
                "a data type",
                {"stages.0.communication": {"powersgd": {}, "data_type": "bf16"}},
                ("both powersgd and data_type",),
            ),
            (
                "too early a start",
                {"stages.0.communication": {"powersgd": {"start_step": 1}}},
                ("start_step is 1", "greater than or equal to 2"),
            ),
        )
    ),
    (
        "gradients' precision with other axes",
        {
            "stages.0.communication": {"data_type": "bf16"},
            "stages.0.parallel": {"sequence": 2},
            "stages.0.gpus_per_node": 2,
        },
        {},
        ("data_type with parallel.sequence 2 is not proved here", "or drop data_type"),
    ),
    (
        "balance loss in fp16",
        {"stages.0.sequence_balance_weight": 0.001, "stages.0.precision": "fp16"},
        {},
        ("sequence_balance_weight 0.001 with fp16", "use bf16 or fp32"),
    ),
    (
        "gradients in fp8",
        {"stages.0.communication": {"data_type": "fp8"}},
        {},
        ("communication.data_type is 'fp8'", "'fp32', 'bf16' or 'fp16'"),
    ),
    (
        "experts that ranks cannot share",
        {"model": {"deepseek_v3": MIXTURE}, "stages.0.parallel": {"expert": 8}, "stages.0.gpus_per_node": 8},
        {},
        ("expert 8: the model has 4 routed experts", "set expert to 1, 2 or 4"),
    ),
    (
        "experts of a dense model",
        {"stages.0.parallel": {"expert": 2}, "stages.0.gpus_per_node": 2},
        {},
        ("expert 2: the model has 0 routed experts", "set expert to 1"),
    ),
    (
        "more experts' ranks than data ranks",
        {"model": {"deepseek_v3": MIXTURE}, "stages.0.parallel": {"expert": 4}, "stages.0.gpus_per_node": 2},
        {},
        ("expert is 4", "here 2", "set expert to 1 or 2"),
    ),
    (
        "more stages than layers",
        {"stages.0.parallel": {"pipeline": 4}, "stages.0.gpus_per_node": 4},
        {},
        ("pipeline 4: the model has 2 layers", "at most 2 stages"),
    ),
    (
        "a stage without experts",
        {
            "model": {"deepseek_v3": MIXTURE},
            "stages.0.parallel": {"pipeline": 2, "expert": 2},
            "stages.0.gpus_per_node": 4,
        },
        {},
        ("1 layers, all of them dense", "at most 1 stages, or set expert to 1"),
    ),
    (
        "a pipeline with ZeRO 2",
        {"stages.0.parallel": {"pipeline": 2}, "stages.0.gpus_per_node": 2, "stages.0.zero": {"stage": 2}},
        {},
        ("pipeline 2 with ZeRO stage 2", "set zero.stage to 1"),
    ),
    (
        "tensor parallelism with ZeRO 0",
        {"stages.0.parallel": {"tensor": 2}, "stages.0.gpus_per_node": 2, "stages.0.zero": {"stage": 0}},
        {},
        ("tensor 2 with ZeRO stage 0", "set zero.stage to 1, 2 or 3"),
    ),
    (
        "a hierarchy with tensor ranks",
        {
            "stages.0.parallel": {"tensor": 2},
            "stages.0.gpus_per_node": 4,
            "stages.0.zero": {"stage": 3, "hierarchical_partition": 2},
        },
        {},
        ("hierarchical_partition with tensor parallelism is not proved here", "drop the key"),
    ),
    (
        "sequence and tensor parallelism",
        {"stages.0.parallel": {"tensor": 2, "sequence": 2}, "stages.0.gpus_per_node": 4},
        {},
        ("sequence 2 with tensor 2 is not proved here", "set tensor to 1"),
    ),
    (
        "heads that sequence ranks cannot share",
        {"stages.0.parallel": {"sequence": 4}, "stages.0.gpus_per_node": 4},
        {},
        ("sequence 4 does not divide the model's num_key_value_heads 2", "set sequence to 1 or 2"),
    ),
    (
        "a sequence that ranks cannot share",
        {"stages.0.parallel": {"sequence": 2}, "stages.0.gpus_per_node": 2, "stages.0.sequence_length": 63},
        {},
        ("sequence_length 63 is no multiple of parallel.sequence 2", "use a sequence_length of 62"),
    ),
    (
        "fp16 with an axis",
        {"stages.0.parallel": {"tensor": 2}, "stages.0.gpus_per_node": 2, "stages.0.precision": "fp16"},
        {},
        ("fp16 with tensor parallelism is not proved here", "use bf16 or fp32"),
    ),
    (
        "a hierarchy without ZeRO 3",
        {"stages.0.zero": {"stage": 2, "hierarchical_partition": 2}},
        {},
        ("hierarchical_partition 2 needs ZeRO stage 3",),
    ),
    (
        "a hierarchy that does not divide",
        {"stages.0.zero": {"stage": 3, "hierarchical_partition": 3}, "stages.0.gpus_per_node": 4},
        {},
        ("hierarchical_partition 3 does not divide the 4 ranks", "use 1, 2 or 4"),
    ),
    (
        "fp16 without a GPU",
        {"stages.0.precision": "fp16"},
        {"node.gpus": 0, "cuda_build": "cpu"},
        ("stages.base: precision fp16", "site centre", "set precision to bf16 or fp32"),
    ),
    (
        "GPUs and torch's CPU build",
        {},
        {"cuda_build": "cpu"},
        ("node.gpus 8 with cuda_build cpu", "set cuda_build, e.g. cu130"),
    ),
    (
        "several nodes without a network",
        {},
        {"interconnect": {"kind": "none"}},
        ("interconnect.kind none is one machine, and max_nodes is 16",),
    ),
    ("a build that no wheel has", {}, {"cuda_build": "12.8"}, ("cuda_build is '12.8'", "cu[0-9]")),
    # Slips and malice, as found by playing a user at a centre.
    ("a number without end", {"stages.0.tokens": 10**400, "stages.0.steps": ...}, {}, ("stages.0.tokens is 1000", "…")),
    ("endless layers", {"model.llama.num_hidden_layers": 10**9}, {}, ("num_hidden_layers is 1000000000", "10000")),
    (
        "an endless vocabulary in parts",
        {"model.llama.vocab_size": 10**8 - 1, "stages.0.parallel": {"tensor": 2}, "stages.0.gpus_per_node": 2},
        {},
        ("tensor 2 does not divide the model's vocab_size 99999999", "set tensor to 1"),
    ),
    ("endless nodes", {}, {"max_nodes": 10**12}, ("max_nodes is 1000000000000", "100000")),
    (
        "units of nothing",
        {"datasets.prose": {"kind": "text", "python_stdlib": {}, "unit_mb": 1e-300}},
        {},
        ("unit_mb is 1e-300",),
    ),
    ("an empty path", {"datasets.prose": {"kind": "text", "files": [""]}}, {}, ("files.0 is ''", "not empty")),
    ("no data files", {"datasets.prose": {"kind": "text", "files": []}}, {}, ("exactly one of files, hub",)),
    (
        "an unknown home",
        {"tokenizer": {"path": "~nobody-at-all/t"}},
        {},
        ("tokenizer.path '~nobody-at-all/t' is no path",),
    ),
    (
        "a path too long",
        {"datasets.prose": {"kind": "text", "files": ["a" * 3000]}},
        {},
        ("datasets.prose.files 'aaa", "File name too long"),
    ),
    ("a site's path too long", {"site": "a" * 3000}, {}, ("site: there is no site 'aaa",)),
    ("a folder for a template", {"tokenizer.chat_template": "."}, {}, ("tokenizer.chat_template: ", "is no file")),
    (
        "a key that is no text",
        {"datasets": {True: {"kind": "text"}}},
        {},
        ("datasets.True: key True is no text", "quote"),
    ),
    ("a date for a name", {"run": datetime.date(2026, 1, 1)}, {}, ("run is 2026-01-01, which YAML reads as a date",)),
    (
        "a dataset with the lock's name",
        {"datasets.model": {"kind": "text", "python_stdlib": {}}},
        {},
        ("datasets.model: ",),
    ),
    ("odd heads", {"model.llama.hidden_size": 12}, {}, ("heads are 3 wide", "even width")),
    ("a width that heads do not divide", {"model.llama.hidden_size": 65}, {}, ("hidden_size 65 is not a multiple",)),
    ("an unknown rotary scaling", {"model.llama.rope_scaling": {"rope_type": "yarm"}}, {}, ("'yarm'", "yarn")),
    (
        "more experts chosen than there are",
        {"model": {"deepseek_v3": {**MIXTURE, "num_experts_per_tok": 5}}},
        {},
        ("num_experts_per_tok 5 is more than n_routed_experts 4",),
    ),
    (
        "a window without a return",
        {"stages.0.nonfinite": {"policy": "skip", "window_batches": 2}},
        {},
        ("window_batches has no meaning for policy skip",),
    ),
    ("checks beyond the partition", {"checks.minutes": 2000}, {}, ("checks.minutes 2000: partition gpu allows 1440",)),
    ("jobs for no dataset", {"data_jobs": {"x": 2}}, {}, ("data_jobs: there is no dataset 'x'", "prose, chats")),
    (
        "jobs for a mixture",
        {"datasets.m": {"kind": "text", "mixture": {"prose": 1}}, "data_jobs": {"m": 2}},
        {},
        ("data_jobs: m is a mixture, nothing of it is encoded",),
    ),
    ("no jobs for a dataset", {"data_jobs": {"prose": 0}}, {}, ("data_jobs.prose is 0",)),
    ("data beyond the partition", {"data_minutes": 2000}, {}, ("data_minutes 2000: partition gpu allows 1440",)),
    ("an option for an account", {}, {"account": "--wrap=id"}, ("account is '--wrap=id'", "the first a letter")),
    (
        "an option for a module",
        {},
        {"software": {"kind": "modules", "modules": ["-h"]}},
        ("software.modules.0 is '-h'",),
    ),
    # the executor plugin hands these two to a shell unquoted
    ("a command in a reservation", {}, {"reservation": "a&reboot"}, ("reservation is 'a&reboot'",)),
    ("a command in a GPU type", {}, {"gpu_type": "a100|reboot"}, ("gpu_type is 'a100|reboot'",)),
    ("a GPU type that no gres takes", {}, {"gpu_type": "rtx-3090", "gpu_request": "gres"}, ("gpu_type 'rtx-3090'",)),
    (
        "a relative environment",
        {},
        {"software": {"kind": "venv", "path": "~/venv"}},
        ("path '~/venv' is not absolute",),
    ),
    (
        "an option for a bind",
        {},
        {"software": {"kind": "container", "path": "/a.sif", "binds": ["--pwn"]}},
        ("binds '--pwn' is not absolute",),
    ),
    ("a variable of ours", {}, {"environment": {"PYTHONPATH": "/x"}}, ("environment sets PYTHONPATH",)),
    ("a geometry of its own", {}, {"srun_extra": ["--nodes=1"]}, ("srun_extra holds --nodes",)),
    ("fewer cores than GPUs", {}, {"node.cpus": 4}, ("cpus 4 are fewer than gpus 8",)),
    ("this machine, 16 times", {}, {"scheduler": "local"}, ("scheduler local is this machine, and max_nodes is 16",)),
    ("qwZ", {"stages.0.zero": {"zero_quantized_weights": True}}, {}, ("qwZ", "is not proved here")),
    ("qgZ", {"stages.0.zero": {"zero_quantized_gradients": True}}, {}, ("qgZ", "is not proved here")),
    ("ZenFlow", {"stages.0.zero": {"zenflow": {"topk_ratio": 0.1}}}, {}, ("ZenFlow", "is not proved here")),
]


@pytest.mark.parametrize(("config", "site", "says"), [case[1:] for case in CONFIGS], ids=[case[0] for case in CONFIGS])
def test_config(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    site: dict[str, Any],
    says: tuple[str, ...],
):
    path = write_config(tmp_path, config, site)
    before = files_below(tmp_path)
    message = refused(capsys, "plan", str(path))
    assert [text for text in says if text not in message] == [], message
    assert files_below(tmp_path) == before


CONFIG_JSON = {"model_type": "llama", "tie_word_embeddings": False, **LLAMA}
PRETRAINED: dict[str, tuple[Any, dict[str, str], str]] = {
    "no weights": (
        CONFIG_JSON,
        {},
        "holds no weights (*.safetensors)",
    ),
    "a config that is a list": ([], {"model.safetensors": ""}, "config.json holds a list, not keys and values"),
    "weights in four bits": (
        {**CONFIG_JSON, "quantization_config": {"quant_method": "awq", "bits": 4}},
        {"model.safetensors": ""},
        "quantization_config has quant_method 'awq', fmt None, weight_block_size None; only DeepSeek's block-scaled FP8",
    ),
    "FP8 without blocks": (
        {**CONFIG_JSON, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
        {"model.safetensors": ""},
        "weight_block_size [rows, columns]",
    ),
    "an unknown architecture": (
        {"model_type": "rwkv"},
        {"model.safetensors": ""},
        "model_type 'rwkv' is not supported",
    ),
    "a size that is missing": (
        {key: value for key, value in CONFIG_JSON.items() if key != "hidden_size"},
        {"model.safetensors": ""},
        "the llama config lacks hidden_size",
    ),
    "a size that is text": (
        {**CONFIG_JSON, "hidden_size": "64"},
        {"model.safetensors": ""},
        "hidden_size of the llama config is '64', not a whole number",
    ),
    "a size of nothing": (
        {**CONFIG_JSON, "num_attention_heads": 0},
        {"model.safetensors": ""},
        "num_attention_heads of the llama config is 0, not a whole number from 1",
    ),
    "endless layers": (
        {**CONFIG_JSON, "num_hidden_layers": 10**12},
        {"model.safetensors": ""},
        "num_hidden_layers of the llama config is 1000000000000, not a whole number from 1",
    ),
    "half a download": (
        CONFIG_JSON,
        {
            "1.safetensors": "",
            "model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
        },
        "names 2.safetensors, not there (1 of 2 files)",
    ),
}


@pytest.mark.parametrize(("model", "files", "says"), PRETRAINED.values(), ids=PRETRAINED)
def test_pretrained_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Any, files: dict[str, str], says: str
):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in {**files, "config.json": json.dumps(model)}.items():
        (folder / name).write_text(content)
    path = write_config(tmp_path, {"model": {"pretrained": {"path": "model"}}})
    assert says in refused(capsys, "plan", str(path))


def test_a_whole_pretrained_folder_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    (tmp_path / "model.safetensors").write_text("")
    main(["plan", str(write_config(tmp_path, {"model": {"pretrained": {"path": "."}}}))])
    assert "base" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [b"a{run}.txt", b"a\n.txt", b"caf\xe9.txt"], ids=["a wildcard", "two lines", "Latin-1"]
)
def test_a_data_file_that_no_rule_can_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: bytes):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / os.fsdecode(name)).write_text("text")
    path = write_config(tmp_path, {"datasets.prose": {"kind": "text", "files": ["data/*.txt"]}})
    assert "datasets.prose.files: " in refused(capsys, "plan", str(path))


def test_hostile_values_arrive_as_they_are_or_not_at_all(tmp_path: Path):
    """Through Snakemake's own shell: folder, config and variables with quotes, blanks, expansions and braces."""
    folder = tmp_path / "it's {run} $(touch pwned) #SBATCH"
    hostile = "$(touch pwned) '\" {run} #SBATCH"
    config = write_config(
        folder, {"storage": {"weights": hostile}}, {"scheduler": "local", "max_nodes": 1, "environment": {"X": hostile}}
    )
    run = tmp_path / "run"
    run.mkdir()
    done = snakemake(run, "results/small/plan.json", "--configfile", str(config), "--forcerun", "render")
    assert done.returncode == 0, done.stderr
    assert (run / "results" / "small" / "config.yaml").read_text() == config.read_text()
    launch = (run / "results" / "small" / "jobs" / "environment" / "launch.sh").read_text()
    shown = [line for line in launch.splitlines() if line.startswith("export X=")]
    told = subprocess.run(
        ["bash", "-c", f'{shown[0]}; printf %s "$X"'], cwd=run, capture_output=True, text=True, check=True
    )
    assert told.stdout == hostile
    assert not [*tmp_path.rglob("pwned"), *REPOSITORY.glob("pwned")]


TEXTS: dict[str, tuple[bytes, str]] = {
    "not YAML": (b"run: [a\nseed: 1\n", "is not valid YAML"),
    "a key twice": (b"run: a\nrun: b\n", "key 'run' is written twice, in lines 1 and 2"),
    "a list": (b"- run\n", "expected keys and values"),
    "empty": (b"", "expected keys and values"),
    "a tab": (b"run: a\n\tseed: 1\n", "line 2"),
    "Latin-1": ("run: caf\u00e9\n".encode("latin-1"), "is not UTF-8"),
    "a Python object": (b"run: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
    "a date": (b"run: 2026-01-01\n", "quote the value"),
    "a date that is none": (b"run: 2026-13-45\n", "month must be in 1..12"),
    "a number of 5000 digits": (b"seed: " + b"1" * 5000 + b"\n", "quote the value, or mend it"),
    "an alias of itself": (b"run: &a [*a]\n", "found unconstructable recursive node"),
    "a billion laughs": (
        b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (i + 1, i + 1, b",".join([b"*%c" % i] * 10)) for i in range(ord("a"), ord("j"))),
        "its aliases (&, *) followed",
    ),
    "a deep pit": (b"run: " + b"[" * 5000 + b"]" * 5000 + b"\n", "nested too deeply"),
    "expressions of Snakemake's YAML": (
        b"__use_yte__: true\nrun: ?__import__('os').system('touch pwned')\n",
        "__use_yte__",
    ),
}


@pytest.mark.parametrize(("content", "says"), TEXTS.values(), ids=TEXTS)
def test_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert says in refused(capsys, "plan", str(path))
    assert files_below(tmp_path) == {"run.yaml"}


def test_config_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "does not exist" in refused(capsys, "plan", str(tmp_path / "no.yaml"))
    assert "is a folder" in refused(capsys, "plan", str(tmp_path))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tokenizer.json, the manifest of a tokenizer of 400 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, [write_jsonl(folder / "corpus.jsonl", "text", (text(i) for i in range(200)))])
    return folder


def write_job(folder: Path, job: Job) -> str:
    job.write(folder / "job.json")
    return str(folder / "job.json")


GOOD = b'{"text": "one"}\n{"text": "two"}\n'
DATA: dict[str, tuple[str, bytes, str]] = {
    "broken JSON": ("a.jsonl", GOOD + b'{"text": "thr\n', "a.jsonl:3: not valid JSON"),
    "missing column": ("a.jsonl", GOOD + b'{"body": "x"}\n', "a.jsonl:3: no column 'text'; found 'body'"),
    "null": ("a.jsonl", GOOD + b'{"text": null}\n', "a.jsonl:3: text is null"),
    "a number": ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: text is int '5', not a string"),
    "invalid UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl:3: byte 0xff is not valid UTF-8"),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: text holds half of a surrogate pair"),
    "no documents": ("a.jsonl", b"\n\n", "a.jsonl holds no documents"),
    "empty": ("a.jsonl", b"", "a.jsonl is empty"),
    "cut short": ("a.jsonl.gz", b"\x1f\x8b\x08\x00abc", "cannot read"),
    "no Parquet": ("a.parquet", b"PAR1 and nothing more", "cannot read"),
    "CSV with another header": ("a.csv", b"body,n\nx,1\n", "a.csv:1: no column 'text'; found 'body', 'n'"),
    "CSV with an open comma": ("a.csv", b"text,n\na, b,1\n", "a.csv:2: 3 fields where the header has 2"),
    "unknown ending": ("a.bin", b"abc", "the ending does not tell its format"),
}


@pytest.mark.parametrize(("name", "content", "says"), DATA.values(), ids=DATA)
def test_data(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tokenizer_folder: Path,
    name: str,
    content: bytes,
    says: str,
):
    (tmp_path / name).write_bytes(content)
    job = tokenize_job(tmp_path, tokenizer_folder, [tmp_path / name], dataset())
    assert says in refused(capsys, "tokenize", write_job(tmp_path, job))
    assert files_below(tmp_path) - {name, "job.json", "data"} == set(), "something was left half-written"


CHATS: dict[str, tuple[Any, str]] = {
    "text instead of messages": ("hello", "a.jsonl:1: a conversation is a list of messages, found str"),
    "no messages": ([], "found an empty list"),
    "unknown role": ([{"role": "robot", "content": "x"}], "message 1: role 'robot' is not one of system"),
    "no content": ([{"role": "user"}], "message 1: no 'content'; found 'role'"),
    "content that is no text": ([{"role": "user", "content": 1}], "message 1: content is int '1'"),
}


@pytest.mark.parametrize(("messages", "says"), CHATS.values(), ids=CHATS)
def test_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path, messages: Any, says: str):
    write_jsonl(tmp_path / "a.jsonl", "messages", [messages, conversation(1)])
    job = tokenize_job(tmp_path, tokenizer_folder, [tmp_path / "a.jsonl"], dataset("chat"))
    assert says in refused(capsys, "tokenize", write_job(tmp_path, job))


def test_a_tokenizer_beyond_the_models_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path
):
    made = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    job = tokenizer_job(tmp_path, path=made["path"], train_vocab_size=None, model_vocab_size=300)
    message = refused(capsys, "tokenizer", write_job(tmp_path, job))
    assert f"the tokenizer has {made['vocab_size']} tokens; the model's vocab_size is 300" in message
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_tokenizer_without_eos(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path):
    made = Path(json.loads((tokenizer_folder / "tokenizer.json").read_text())["path"])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
    job = tokenizer_job(tmp_path, path=str(tmp_path / "bare"), train_vocab_size=None, needs_chat_template=False)
    assert "bare has no EOS token" in refused(capsys, "tokenizer", write_job(tmp_path, job))
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_tokenizer_beyond_what_shards_can_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path
):
    shutil.copytree(json.loads((tokenizer_folder / "tokenizer.json").read_text())["path"], tmp_path / "large")
    path = tmp_path / "large" / "tokenizer.json"
    written = json.loads(path.read_text())
    written["model"]["vocab"]["unheard of"] = 2**31
    path.write_text(json.dumps(written))
    job = tokenizer_job(tmp_path, path=str(tmp_path / "large"), train_vocab_size=None, model_vocab_size=None)
    message = refused(capsys, "tokenizer", write_job(tmp_path, job))
    assert "ids reach 2147483648; shards hold ids up to 2147483647" in message


def test_a_job_file_of_another_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "job.json").write_text('{"run": "a"}')
    assert "is not a complete TokenizeJob" in refused(capsys, "tokenize", str(tmp_path / "job.json"))
    assert "does not exist" in refused(capsys, "train", str(tmp_path / "no.json"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(tmp_path: Path, tokenizer_folder: Path):
    """A file system of 200 KiB, in a mount namespace of this test alone."""
    write_jsonl(tmp_path / "a.jsonl", "text", (text(i, 300) for i in range(400)))
    (tmp_path / "small").mkdir()
    job = tokenize_job(tmp_path / "small", tokenizer_folder, [tmp_path / "a.jsonl"], dataset())
    words = [sys.executable, "-m", "longhaul", "tokenize", write_job(tmp_path, job)]
    script = 'mount -t tmpfs -o size=200k none small && "$@"; code=$?; find small -name "*.bin" -o -name "*.json"; exit $code'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "bash", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "No space left on device" in done.stderr, done.stderr
    assert "storage.data" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.split() == [], "shards were left half-written"


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = ["-s", str(REPOSITORY / "Snakefile"), "--directory", str(folder)]
    profile = ["--profile", str(REPOSITORY / "profiles" / "local")]
    command = [sys.executable, "-m", "snakemake", *where, *profile, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], str]] = {
    "a mistake in the config": ({"stages.0.steps": 0}, {}, [], "stages.0.steps is 0"),
    "a value on the command line": ({}, {}, ["--config", "seed=4"], "--config sets seed"),
    "two configs": ({}, {}, [str(REPOSITORY / "config" / "config.yaml")], "--configfile names 2 files"),
    "a Slurm site without Slurm": ({}, {}, [], "use --profile profiles/slurm"),
    "the same in a dry run": ({}, {}, ["-n", "-j4"], "use --profile profiles/slurm"),
    "this machine through Slurm": (
        {},
        {"scheduler": "local", "max_nodes": 1},
        ["-n", "--executor", "slurm", "-j4"],
        "site centre has scheduler: local, but Snakemake's executor is slurm",
    ),
}


@pytest.mark.parametrize(("changes", "site", "arguments", "says"), CALLS.values(), ids=CALLS)
def test_snakemake_says_so_before_any_job(
    tmp_path: Path, changes: dict[str, Any], site: dict[str, Any], arguments: list[str], says: str
):
    config = write_config(tmp_path / "config", changes, site)
    run = tmp_path / "run"
    run.mkdir()
    done = snakemake(run, "--configfile", str(config), *arguments)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "remedy: " in done.stderr
    assert not (run / "results").exists()


UNREADABLE: dict[str, tuple[str, list[str], str]] = {
    "no such file": ("no.yaml", ["-n"], "no.yaml does not exist"),
    "a folder": (".", ["-n"], "is a folder"),
    "broken YAML": ("broken.yaml", ["-n"], "broken.yaml is not valid YAML: expected"),
    "a second config": ("run.yaml", ["-n", "--configfile=other.yaml"], "--configfile=other.yaml names a second config"),
}


@pytest.mark.parametrize(("config", "options", "says"), UNREADABLE.values(), ids=UNREADABLE)
def test_run_reads_the_config_before_snakemake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, options: list[str], says: str
):
    write_config(tmp_path)
    (tmp_path / "broken.yaml").write_text("run: [a\nseed: 1\n")
    assert says in refused(capsys, "run", str(tmp_path / config), *options)


def test_run_becomes_snakemake(tmp_path: Path):
    """Options and targets arrive, and the config is that file."""
    config = write_config(tmp_path, None, {"scheduler": "local", "max_nodes": 1})
    words = ["-m", "longhaul", "run", config.name, "results/small/plan.json", "-n", "--profile", "none"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^render +1$", done.stdout, re.MULTILINE) and "train_stage" not in done.stdout


def test_a_working_folder_that_no_script_can_name(tmp_path: Path):
    config = write_config(tmp_path / "config", None, {"scheduler": "local", "max_nodes": 1})
    run = tmp_path / "costs $5"
    run.mkdir()
    done = snakemake(run, "-n", "--configfile", str(config))
    assert done.returncode == 2 and "holds '$'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "remedy: " in done.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    """A file stands where results/ has to be: root may write wherever a mode forbids it."""
    config = write_config(tmp_path / "config")
    (tmp_path / "results").write_text("")
    done = snakemake(tmp_path, "--configfile", str(config))
    assert done.returncode == 2, done.stderr
    assert "results" in done.stderr and "remedy: " in done.stderr and "Traceback" not in done.stderr
