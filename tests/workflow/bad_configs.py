"""Configs and site files with one mistake each, and texts that the error message must contain: key, value, limit, remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import CHAT, DEEPSEEK, DEEPSEEK_V2, LLAMA, SITE, STAGE


def stages(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one stage per argument: STAGE with these keys changed."""
    return [{**STAGE, **change} for change in changes]


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write texts to files. files: path below the folder -> text"""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


QWEN3_MOE = {
    **LLAMA,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

_GPUS = SITE["partitions"][0] | {"jobs": ["gpu"]}
_CPUS = {"jobs": ["cpu"], "name": "cpu", "max_minutes": 60, "node": {"cpus": 8, "memory_mb": 8000}}
# Mistakes in the partitions and the software of a site file: as CONFIGS, without changes of the config.
SITES: list[tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    (mistake, {}, changes, expected)
    for mistake, changes, expected in (
        (
            "minimum in GFLOP/s",
            {"node_minimums": {"matrix_tflops": 640_000.0}},
            ("node_minimums.matrix_tflops is 640000.0", "less than or equal to 20000"),
        ),
        (
            "minimum above the datasheet",
            {"node_minimums": {"matrix_tflops": 990.0}, "partitions.0.node.gpu_peak_tflops": 989.0},
            (
                "node_minimums.matrix_tflops 990 is above node.gpu_peak_tflops 989 of partitions.gpu; both are in TFLOP/s",
            ),
        ),
        (
            "rate of a port in bytes",
            {"node_minimums": {"port_gbit_per_s": 5e10}},
            ("node_minimums.port_gbit_per_s is 50000000000.0", "less than or equal to 3200"),
        ),
        (
            "account outside of a partition",
            {"account": "proj"},
            ("account is not a known key; it is a key of partitions",),
        ),
        ("node outside of a partition", {"node": {"cpus": 4}}, ("node is not a known key; it is a key of partitions",)),
        ("key of an earlier release", {"cuda_build": "cu130"}, ("cuda_build is not a known key; write accelerator: ",)),
        ("partitions by name", {"partitions": {"gpu": {"name": "gpu"}}}, ("partitions is {", "expected: a list")),
        ("partition without jobs", {"partitions.0.jobs": []}, ("partitions.gpu.jobs is []", "at least 1 item")),
        ("unknown kind of job", {"partitions.0.jobs": ["gpu", "tpu"]}, ("partitions.gpu.jobs.1 is 'tpu'", "'login'")),
        ("no partition for training", {"partitions.0.jobs": ["cpu"]}, ("no partition has jobs: [gpu]", "add gpu")),
        (
            "two partitions for one kind of job",
            {"partitions": [{**_GPUS, "jobs": ["gpu", "cpu"]}, {**_CPUS, "jobs": ["cpu", "login"]}]},
            ("partitions name the jobs cpu 2 times", "remove it from all but one"),
        ),
        (
            "partition without a time limit",
            {"partitions.0.max_minutes": ...},
            ("partitions.gpu.max_minutes is missing", "scheduler slurm needs it"),
        ),
        (
            "checks where there is no GPU",
            {"partitions": [_GPUS, {**_CPUS, "jobs": ["debug"]}]},
            ("partitions.cpu.jobs: debug jobs test GPUs", "give debug to another one"),
        ),
        (
            "two partitions of a local site",
            {"scheduler": "local", "partitions": [{**_GPUS, "max_nodes": 1}, _CPUS]},
            ("scheduler local: the site is one machine",),
        ),
        (
            "local site with two nodes",
            {"scheduler": "local", "partitions.0.max_nodes": 2},
            ("scheduler local: the site is one machine", "max_nodes 1"),
        ),
        *(
            (f"sbatch option {option}", {"partitions.0.sbatch_extra": [option]}, (f"sbatch_extra contains {text}",))
            for option, text in (
                ("--nodes=4", "--nodes, which follows from the plan"),
                ("--par=x", "--par (--parsable), which longhaul sets itself"),
                ("--wrap=id", "--wrap, which longhaul sets itself"),
                ("--output=/tmp/x", "--output, which longhaul sets itself"),
                ("--signal=B:TERM@60", "--signal=B:TERM@60: a signal to the batch shell ends the job"),
                ("--signal=USR1@60", "--signal=USR1@60: longhaul saves and stops at SIGTERM"),
                ("--sig=USR1@60", "--sig=USR1@60: longhaul saves and stops at SIGTERM"),
            )
        ),
        (
            "sbatch option given twice",
            {"partitions.0.sbatch_extra": ["--mail-type=END", "--mail-type=FAIL"]},
            ("sbatch_extra contains --mail-type twice",),
        ),
        *(
            (f"shell in an sbatch option: {option}", {"partitions.0.sbatch_extra": [option]}, ("sbatch_extra.0 is",))
            for option in (
                "--licenses=$(id)",
                "--licenses=a;id",
                "--licenses=a b",
                "--licenses=[ab]",
                "-A x",
                "--x=`id`",
            )
        ),
        ("shell in a resource", {"partitions.0.gres_extra": ["nvme:1;id"]}, ("gres_extra.0 is 'nvme:1;id'",)),
        (
            "two ways to switch hyperthreads off",
            {"partitions.0.threads_per_core": 1, "partitions.0.sbatch_extra": ["--hint=nomultithread"]},
            ("--hint=nomultithread, which Slurm refuses with threads_per_core",),
        ),
        (
            "abbreviated second way to switch hyperthreads off",
            {"partitions.0.threads_per_core": 1, "partitions.0.sbatch_extra": ["--hin=nomultithread"]},
            ("--hin=nomultithread, which Slurm refuses with threads_per_core",),
        ),
        *(
            (
                f"whole nodes that are shared: {option}",
                {"partitions.0.exclusive": True, "partitions.0.sbatch_extra": [option]},
                (f"sbatch_extra contains {option}, which contradicts exclusive true; remove one of them",),
            )
            for option in ("--oversubscribe", "--overs")
        ),
        *(
            (
                f"GPUs asked for twice: {item}",
                {"partitions.0.gres_extra": ["nvme:100", item]},
                (f"gres_extra contains {gpus}, but gpu_request gpus_per_node asks for GPUs already",),
            )
            for item, gpus in (("gpu", "gpu"), ("gpu:a100:2", "gpu:a100:2"), ("shm:1,gres:gpu:2", "gres:gpu:2"))
        ),
        (
            "GPU type that no option requests",
            {"partitions.0.gpu_request": "none", "partitions.0.gpu_type": "a100"},
            ("gpu_type a100 has no effect with gpu_request none", "remove it"),
        ),
        (
            "GPU type of nodes without GPUs",
            {"partitions": [_GPUS, {**_CPUS, "gpu_type": "a100"}]},
            ("partitions.cpu: gpu_type a100 has no effect with node.gpus 0", "set node.gpus, or remove gpu_type"),
        ),
        (
            "binding to GPUs that nodes do not have",
            {"partitions.0.node.gpus": 0, "partitions.0.gpu_bind": "closest"},
            ("partitions.gpu: gpu_bind closest has no effect with node.gpus 0", "set node.gpus, or remove gpu_bind"),
        ),
        (
            "binding where nothing is trained",
            {"partitions": [_GPUS, {**_CPUS, "cpu_bind": "cores"}]},
            ("partitions.cpu: cpu_bind has no effect", "only training is bound"),
        ),
        ("shell in a binding", {"partitions.0.cpu_bind": "cores;id"}, ("cpu_bind is 'cores;id'",)),
        (
            "ranks that do not see the GPUs that they divide cores by",
            {"partitions.0.cpu_bind": "auto", "partitions.0.gpu_bind": "closest"},
            ("cpu_bind auto with gpu_bind closest", "set gpu_bind to none"),
        ),
        (
            "two addresses of rank 0",
            {"interconnect": {"master_address": {"suffix": "i", "interface": "ib0"}}},
            ("names both suffix and interface",),
        ),
        ("shell in a suffix", {"interconnect": {"master_address": {"suffix": ";id"}}}, ("suffix is ';id'",)),
        ("srun container without an image", {"software": {"kind": "srun"}}, ("kind srun needs options",)),
        (
            "size of a step among the options of a container",
            {"software": {"kind": "srun", "options": ["--environment=/a.toml", "--nodes=1"]}},
            ("options contains --nodes, which follows from the plan",),
        ),
        (
            "mounts that longhaul lists",
            {"software": {"kind": "srun", "options": ["--container-image=/a", "--container-mounts=/a:/a"]}},
            ("options contains --container-mounts",),
        ),
        ("binds without a container", {"software": {"binds": ["/a"]}}, ("binds has no effect with kind current",)),
        (
            "binds of a container that its own file describes",
            {"software": {"kind": "srun", "options": ["--environment=/a.toml"], "binds": ["/a"]}},
            ("binds has no effect with kind srun", "names its mounts"),
        ),
        ("Python of a venv", {"software": {"kind": "venv", "path": "/v", "python": "/p"}}, ("python has no effect",)),
        ("module folders without modules", {"software": {"module_use": ["/m"]}}, ("need modules",)),
    )
]

# (mistake, changes of the config, changes of the site, texts in the message)
_QUIZ = {"tasks": ["quiz"], "files": ["quiz.yaml"]}
_SERVED = {"tasks": ["arc_easy"], "engine": "server"}
_VLLM = {"engine": "vllm", "python": ["/bin/sh"]}
"""An engine that is installed: the plan looks for the program alone."""
_WIDE = {"model.llama": {**LLAMA, "hidden_size": 512, "intermediate_size": 512, "num_key_value_heads": 4}}
_OFFLOAD = {
    f"stages.{index}.zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"} for index in (0, 1)
}

CONFIGS: list[tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ("misspelt key", {"datsets": {}}, {}, ("datsets is not a known key", "did you mean datasets?")),
    ("misspelt stage key", {"stages.0.gradient_cliping": 1}, {}, ("stages.base.gradient_cliping", "known key")),
    (
        "misspelt nested key",
        {"stages.0.optimizer": {"gradient_cliping": 1.0}},
        {},
        ("stages.base.optimizer.gradient_cliping", "did you mean gradient_clipping?"),
    ),
    (
        "misspelt ZeRO key",
        {"stages.0.zero": {"overlap_com": True}},
        {},
        ("stages.base.zero.overlap_com", "did you mean overlap_comm?"),
    ),
    (
        "misspelt model key",
        {"model.llama.num_hiden_layers": 2},
        {},
        ("num_hiden_layers", "did you mean num_hidden_layers?"),
    ),
    (
        "key of another tool",
        {"stages.0.learning_rate": 1e-4},
        {},
        ("base.learning_rate", "write optimizer.lr of the stage"),
    ),
    ("key of another tool beside the stages", {"max_steps": 9}, {}, ("max_steps is not", "write steps of the stage")),
    (
        "key of another tool in a section",
        {"stages.0.schedule": {"warmup_ratio": 0.1}},
        {},
        ("stages.base.schedule.warmup_ratio is not a known key; write schedule.warmup_steps of the stage",),
    ),
    (
        "key of another tool in a section where it means something else",
        {"stages.0.evaluate": {"tasks": ["arc_easy"], "max_length": 64}},
        {},
        ("stages.base.evaluate.max_length is not a known key; known keys: tasks",),
    ),
    (
        "length of the model under a name that stages have elsewhere",
        {"model.llama.seq_length": 64},
        {},
        ("model.llama.seq_length is not a known key; known keys:",),
    ),
    ("misspelt kind", {"stages.0.kind": "pretrian"}, {}, ("base.kind is 'pretrian'", "did you mean pretrain?")),
    ("missing key", {"run": ...}, {}, ("run is missing",)),
    ("missing model size", {"model.llama.hidden_size": ...}, {}, ("model.llama.hidden_size is missing",)),
    ("string for a number", {"stages.0.steps": "ten"}, {}, ("stages.base.steps is 'ten'", "valid integer")),
    ("number for a boolean", {"stages.0.restart": 1}, {}, ("restart is 1", "boolean")),
    (
        "fraction for an integer",
        {"stages.0.global_batch_size": 8.5},
        {},
        ("stages.base.global_batch_size is 8.5", "integer"),
    ),
    ("zero steps", {"stages.0.steps": 0}, {}, ("stages.base.steps is 0", "greater than or equal to 1")),
    (
        "negative learning rate",
        {"stages.0.optimizer": {"lr": -1.0}},
        {},
        ("stages.base.optimizer.lr is -1.0", "greater than 0"),
    ),
    (
        "unknown precision",
        {"stages.0.precision": "fp4"},
        {},
        ("stages.base.precision is 'fp4'", "'fp32', 'bf16', 'fp16' or 'fp8'"),
    ),
    ("unknown kind", {"stages.0.kind": "dpo"}, {}, ("stages.base.kind is 'dpo'", "'pretrain' or 'sft'")),
    (
        "validation fraction of one",
        {"datasets.prose.validation_fraction": 1.0},
        {},
        ("validation_fraction is 1.0", "less than 1"),
    ),
    ("steps and tokens", {"stages.0.tokens": 100}, {}, ("exactly one of steps, tokens, epochs", "steps and tokens")),
    ("steps and epochs", {"stages.0.epochs": 2}, {}, ("exactly one of steps, tokens, epochs", "steps and epochs")),
    ("no length", {"stages.0.steps": ...}, {}, ("exactly one of steps, tokens, epochs", "none")),
    (
        "no epochs",
        {"stages.0.steps": ..., "stages.0.epochs": 0},
        {},
        ("stages.base.epochs is 0", "greater than 0"),
    ),
    (
        "a word as micro batch",
        {"stages.0.micro_batch_size": "many"},
        {},
        ("stages.base.micro_batch_size: 'many' is no number of samples from 1; write one, or auto",),
    ),
    (
        "auto without the memory of a GPU",
        {"stages.0.micro_batch_size": "auto"},
        {},
        ("stages.base: auto needs the memory of a GPU, and site", "does not state it", "node.gpu_memory_gib"),
    ),
    (
        "warm-up of more than all steps",
        {"stages.0.schedule": {"warmup_steps": 1.5}},
        {},
        ("stages.base.schedule.warmup_steps: 1.5 is neither a number of steps", "nor a share"),
    ),
    (
        "two sources of a dataset",
        {"datasets.prose.files": ["a.txt"]},
        {},
        ("exactly one of files, hub, python_stdlib, mixture",),
    ),
    (
        "mixture with an unknown dataset",
        {"datasets.m": {"kind": "text", "mixture": {"prose": 1, "x": 1}}},
        {},
        ("datasets.m.mixture: there is no dataset 'x'",),
    ),
    (
        "mixture of datasets of two kinds",
        {"datasets.m": {"kind": "text", "mixture": {"chats": 1}}},
        {},
        ("chats has kind chat, m has kind text",),
    ),
    (
        "mixture weights with too many digits",
        {"datasets.m": {"kind": "text", "mixture": {"prose": 1, "x": 1e-6}}},
        {},
        ("1,000,001", "the limit is 10,000", "round the weights"),
    ),
    (
        "prompt column without completion column",
        {"datasets.chats.columns": {"prompt": "p"}},
        {},
        ("prompt is set and completion is not", "set both"),
    ),
    (
        "template of columns with an open brace",
        {"datasets.chats.columns": {"prompt": "{instruction", "completion": "c"}},
        {},
        ("datasets.chats.columns",),
    ),
    (
        "template of columns with an expression",
        {"datasets.chats.columns": {"prompt": "{instruction!r}", "completion": "c"}},
        {},
        ("'{instruction!r}' must hold only names of columns in braces",),
    ),
    (
        "truncate of windows",
        {"stages.0.truncate": "left"},
        {},
        ("stages.base", "truncate left has no effect on kind pretrain"),
    ),
    ("two models", {"model.pretrained": {"path": "m"}}, {}, ("exactly one of llama", "llama and pretrained")),
    ("path in the run's name", {"run": "../elsewhere"}, {}, ("run is '../elsewhere'",)),
    ("path in a stage's name", {"stages.0.name": "a/b"}, {}, ("stages.0.name is 'a/b'",)),
    ("path in a dataset's name", {"datasets.a/b": {"kind": "text", "python_stdlib": {}}}, {}, ("a/b",)),
    ("line break in a name", {"stages.0.name": "base\n#SBATCH"}, {}, ("stages.0.name",)),
    ("line break in a path", {"storage": {"weights": "/a\nb"}}, {}, ("storage.weights",)),
    ("no stages", {"stages": []}, {}, ("stages is []", "at least 1")),
    (
        "two stages with one name",
        {"stages": stages({}, {})},
        {},
        ("stages: the name base occurs twice", "a different name"),
    ),
    (
        "start from an unknown stage",
        {"stages.1.from.stage": "bse"},
        {},
        ("stages.chat.from.stage: there is no stage 'bse'", "base, chat"),
    ),
    (
        "a cycle of stages",
        {"stages": stages({"name": "a", "from": {"stage": "b"}}, {"name": "b", "from": {"stage": "a"}})},
        {},
        ("a <- b <- a is a cycle",),
    ),
    ("unknown dataset", {"stages.0.dataset": "pros"}, {}, ("there is no dataset 'pros'", "prose, chats")),
    (
        "text dataset for sft",
        {"stages": [{**CHAT, "from": None, "dataset": "prose"}]},
        {},
        ("kind sft needs a dataset of kind chat; prose has kind text",),
    ),
    (
        "missing data file",
        {"datasets.prose": {"kind": "text", "files": ["no/*.txt"]}},
        {},
        ("'no/*.txt' matches no file", "relative to the config file"),
    ),
    ("tokenizer of an unknown dataset", {"tokenizer.train.datasets": ["x"]}, {}, ("there is no dataset 'x'",)),
    ("missing tokenizer folder", {"tokenizer": {"path": "nowhere"}}, {}, ("nowhere has no tokenizer.json",)),
    ("missing model folder", {"model": {"pretrained": {"path": "nowhere"}}}, {}, ("model.pretrained.path", "nowhere")),
    (
        "tokenizer larger than the vocabulary",
        {"tokenizer.train.vocab_size": 500},
        {},
        ("vocab_size 500 is larger than the model's vocab_size 400", "at most 400"),
    ),
    (
        "global batch that does not divide",
        {"stages.0.micro_batch_size": 3},
        {},
        ("global_batch_size 8 is not a multiple", "= 3", "of 6"),
    ),
    (
        "warm-up longer than the training",
        {"stages.0.schedule": {"warmup_steps": 11}},
        {},
        ("warmup_steps 11", "10 steps"),
    ),
    (
        "profile beyond the training",
        {"stages.0.profile_steps": [9, 11]},
        {},
        ("stages.base.profile_steps [9, 11] exceed the stage's 10 steps", "profile steps up to 10"),
    ),
    (
        "profile of too many steps",
        {"stages.0.profile_steps": [1, 21]},
        {},
        ("profile_steps [1, 21] must be the first and the last of 1 to 20 steps",),
    ),
    (
        "profile that ends before it begins",
        {"stages.0.profile_steps": [5, 4]},
        {},
        ("profile_steps [5, 4] must be the first and the last",),
    ),
    (
        "wsd without decay",
        {"stages.0.schedule": {"kind": "wsd"}},
        {},
        ("wsd needs decay_steps >= 1; it is 0", "10 to 20 %"),
    ),
    (
        "decay without wsd",
        {"stages.0.schedule": {"decay_steps": 2}},
        {},
        ("decay_steps 2 has no effect with kind cosine", "remove decay_steps"),
    ),
    (
        "bf16 at ZeRO 0",
        {"stages.0.zero": {"stage": 0}, "stages.0.precision": "bf16"},
        {},
        ("bf16 with ZeRO stage 0", "set zero.stage to 1"),
    ),
    (
        "offload at ZeRO 0",
        {"stages.0.zero": {"stage": 0, "offload_optimizer": "cpu"}},
        {},
        ("offload_optimizer cpu needs ZeRO stage >= 1; it is 0", "set zero.stage to 1"),
    ),
    (
        "weights offloaded at ZeRO 1",
        {"stages.0.zero": {"offload_param": "cpu"}},
        {},
        ("offload_param cpu needs ZeRO stage 3; it is 1", "set zero.stage to 3"),
    ),
    *(
        (
            f"optimizer on disk {problem}",
            {"storage": {"scratch": "/local"}, "stages.0.zero": {"stage": 3, "offload_optimizer": "nvme"}, **keys},
            {},
            expected,
        )
        for problem, keys, expected in (
            (
                "at ZeRO 2",
                {"stages.0.zero": {"stage": 2, "offload_optimizer": "nvme"}},
                ("offload_optimizer nvme needs ZeRO stage 3; it is 2", "offload_optimizer to cpu"),
            ),
            ("without a scratch folder", {"storage": {}}, ("nvme needs storage.scratch", "a local disk of every node")),
            (
                "with hpZ",
                {
                    "stages.0.gpus_per_node": 2,
                    "stages.0.zero": {"stage": 3, "offload_optimizer": "nvme", "zero_hpz_partition_size": 2},
                },
                ("zero_hpz_partition_size 2 with offload_optimizer nvme is not supported", "remove"),
            ),
            ("with PowerSGD", {"stages.0.communication": {"powersgd": {}}}, ("powersgd with ZeRO stage 3",)),
        )
    ),
    *(
        (
            f"weights on disk {problem}",
            {
                "storage": {"scratch": "/local"},
                "stages.0.gpus_per_node": 2,
                "stages.0.zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme"},
                **keys,
            },
            {},
            expected,
        )
        for problem, keys, expected in (
            ("without a scratch folder", {"storage": {}}, ("offload_param nvme needs storage.scratch",)),
            (
                "with the optimizer on the GPU",
                {"stages.0.zero": {"stage": 3, "offload_param": "nvme"}},
                ("offload_param nvme with offload_optimizer none is not supported", "offload_optimizer to cpu or nvme"),
            ),
            (
                "with tensor parallelism",
                {"stages.0.parallel": {"tensor": 2}},
                ("offload_param nvme with parallel.tensor 2 is not supported", "set parallel.tensor to 1"),
            ),
            (
                "in fp16",
                {"stages.0.precision": "fp16"},
                ("offload_param nvme with precision fp16 is not supported", "bf16 or fp32"),
            ),
            (
                "with a reuse distance",
                {"stages.0.zero.stage3_max_reuse_distance": 1000},
                ("offload_param nvme with stage3_max_reuse_distance 1000", "remove stage3_max_reuse_distance"),
            ),
            (
                "with a persistence threshold that keeps them whole",
                {"stages.0.zero.stage3_param_persistence_threshold": 2**19 - 1, "stages.0.precision": "fp32"},
                (
                    "stage3_param_persistence_threshold 524287: a tensor with more than 524286 elements is swapped to disk",
                    "to at most 524286",
                ),
            ),
        )
    ),
    ("ZeRO 4", {"stages.0.zero": {"stage": 4}}, {}, ("stages.base.zero.stage is 4", "less than or equal to 3")),
    (
        "sequence longer than the positions",
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
    *(
        (f"model with {problem}", {"model": {family: {**sizes, **keys}}}, {}, (text,))
        for problem, family, sizes, keys, text in (
            (
                "heads of unequal width",
                "llama",
                LLAMA,
                {"num_attention_heads": 6, "head_dim": 16},
                "hidden_size 64 is not a",
            ),
            ("narrow experts", "deepseek_v3", DEEPSEEK, {"moe_intermediate_size": 4}, "it must be a multiple of 8"),
        )
    ),
    *(
        (f"absurd {key}", {key: value}, {}, (key.split(".")[-1], f" is {value!r}", limit))
        for key, value, limit in (
            ("stages.0.optimizer.lr", 1e10, "less than or equal to 10"),
            ("stages.0.optimizer.weight_decay", 1e6, "less than or equal to 100"),
            ("stages.0.recovery.heartbeat_timeout_s", 1e-9, "greater than or equal to 1"),
            ("stages.0.recovery.collective_timeout_s", 1e300, "less than or equal to 1000000"),
            ("stages.0.steps", 10**15, "less than or equal to 1000000000"),
            ("model.llama.initializer_range", 1e30, "less than or equal to 1"),
        )
    ),
    (
        "tokens for too many steps",
        {"stages.0.steps": ..., "stages.0.tokens": 10**15},
        {},
        ("stages.base.tokens 1000000000000000 are 1953125000000 steps; a stage has at most 1000000000",),
    ),
    (
        "a file as storage folder",
        {"storage": {"weights": str(REPOSITORY / "pyproject.toml" / "weights")}},
        {},
        ("storage.weights", "pyproject.toml is not a folder"),
    ),
    (
        "home as storage folder",
        {"storage": {"data": "~/data"}},
        {},
        ("storage.data '~/data' starts with ~", "full path"),
    ),
    (
        "srun option of another user",
        {},
        {"srun_extra": ["--uid=0"]},
        ("srun_extra contains --uid, which is for administrators",),
    ),
    ("shortened srun option", {}, {"srun_extra": ["--ntas=4"]}, ("srun_extra contains --ntas (--ntasks)", "remove it")),
    ("a time without hours", {"stages.0.minutes": "90:00"}, {}, ("stages.base.minutes: '90:00' is no time", "1:30:00")),
    ("a time with seconds", {"data_minutes": "1:30:30"}, {}, ("data_minutes: '1:30:30' is no time", "minutes")),
    ("a time of zero", {"checks.minutes": "0:00:00"}, {}, ("checks.minutes is", "greater than or equal to 1")),
    (
        "longer than the partition allows, as a duration",
        {"stages.0.minutes": "1-00:01:00"},
        {},
        ("minutes 1441: partition gpu allows 1440",),
    ),
    (
        "longer than the partition allows",
        {"stages.0.minutes": 1441},
        {},
        ("minutes 1441: partition gpu allows 1440", "at most 1440 minutes"),
    ),
    (
        "more memory than a GPU has",
        {"model.llama.num_hidden_layers": 10_000},
        {"partitions.0.node.gpu_memory_gib": 1},
        ("GiB per GPU", "site centre has 1 GiB"),
    ),
    ("more files than the quota", {}, {"inode_limit": 28}, ("exceed site centre's inode_limit 28",)),
    ("fewer files than two checkpoints need", {}, {"inode_limit": 5}, ("inode_limit 5", "need 18 files")),
    (
        "more chunk files than the quota",
        {"datasets.chats": {"kind": "chat", "files": [str(REPOSITORY / "docs" / "config.md")], "chunk_mb": 0.001}},
        {"inode_limit": 150},
        (
            "datasets.chats: ",
            " chunks of 0.001 MB need up to ",
            "site centre's inode_limit is 150",
            "set chunk_mb to 1 or more",
        ),
    ),
    (
        "data file of an unknown format",
        {"datasets.prose": {"kind": "text", "files": [str(REPOSITORY / "pyproject.toml")]}},
        {},
        ("datasets.prose.files: ", "pyproject.toml: unknown file suffix", "set `format`"),
    ),
    *(
        (
            f"data files {pattern}",
            {"datasets.prose": {"kind": "text", "files": [pattern]}},
            {},
            ("datasets.prose.files: ", expected),
        )
        for pattern, expected in (
            ("~", "is no folder of data alone"),
            ("/", "is no folder of data alone"),
            ("a**b", "contains **"),
        )
    ),
    (
        "missing evaluation files",
        {"datasets.chats.decontaminate": {"files": ["evals/*.jsonl"]}},
        {},
        ("datasets.chats.decontaminate.files: 'evals/*.jsonl' matches no file",),
    ),
    (
        "a mixture with deduplication",
        {"datasets.both": {"kind": "chat", "mixture": {"chats": 1}, "deduplicate": "near"}},
        {},
        ("datasets.both", "deduplicate near has no effect on a mixture", "set it on the datasets"),
    ),
    (
        "best checkpoint without validation",
        {"stages.1.export": "best", "datasets.chats.validation_fraction": 0.0},
        {},
        ("best checkpoint is needed", "chats", "validation_fraction 0"),
    ),
    (
        "best checkpoint that is not kept",
        {"stages.1.export": "best", "stages.1.checkpoints": {"keep_best": 0}},
        {},
        ("keep_best is 0", "set keep_best to 1"),
    ),
    ("heads that do not divide", {"model.llama.num_key_value_heads": 3}, {}, ("4 is not a multiple of", "3")),
    ("unknown site", {"site": "moon"}, {}, ("there is no site 'moon'", "slurm-generic, slurm-gres")),
    ("missing site file", {"site": "./moon.yaml"}, {}, ("site: ", "moon.yaml does not exist", "correct './moon.yaml'")),
    ("misspelt site key", {}, {"interconect": {}}, ("interconect is not a known key", "did you mean interconnect?")),
    ("site without partitions", {}, {"partitions": ...}, ("partitions is missing",)),
    ("site with an empty list of partitions", {}, {"partitions": []}, ("partitions is []", "at least 1 item")),
    *SITES,
    ("container without an image", {}, {"software": {"kind": "container"}}, ("kind container needs path",)),
    ("shell in an account", {}, {"partitions.0.account": "a; rm -rf b"}, ("account is 'a; rm -rf b'",)),
    ("sbatch option in a partition", {}, {"partitions.0.name": "gpu\n#SBATCH --exclusive"}, ("partitions.0.name",)),
    ("shell in a variable's name", {}, {"environment": {"A;touch b": "1"}}, ("environment.A;touch b",)),
    ("line break in a variable", {}, {"environment": {"A": "1\n2"}}, ("environment.A",)),
    ("shell in an srun option", {}, {"srun_extra": ["--mpi=$(id)"]}, ("srun_extra.0 is '--mpi=$(id)'",)),
    (
        "parallel axes larger than the ranks",
        {"stages.0.parallel": {"tensor": 2, "pipeline": 2}, "stages.0.gpus_per_node": 2},
        {},
        ("tensor 2 x pipeline 2 x sequence 1 = 4 does not divide the 2 ranks", "a product of 1 or 2"),
    ),
    (
        "heads that tensor parallelism cannot split",
        {"stages.0.parallel": {"tensor": 4}, "stages.0.gpus_per_node": 4},
        {},
        ("tensor 4 does not divide the model's num_key_value_heads 2", "set parallel.tensor to 1 or 2"),
    ),
    (
        "vocabulary that tensor parallelism cannot split",
        {"model.llama.vocab_size": 401, "stages.0.parallel": {"tensor": 2}, "stages.0.gpus_per_node": 2},
        {},
        ("tensor 2 does not divide the model's vocab_size 401", "pad vocab_size"),
    ),
    *(
        (
            f"PowerSGD with {problem}",
            {"stages.0.communication": {"powersgd": {}}, "stages.0.gpus_per_node": 2, **keys},
            {},
            expected,
        )
        for problem, keys, expected in (
            ("ZeRO 2", {"stages.0.zero": {"stage": 2}}, ("powersgd with ZeRO stage 2", "set zero.stage to 1")),
            (
                "offload",
                {"stages.0.zero": {"offload_optimizer": "cpu"}},
                ("powersgd with offload_optimizer cpu is not supported", "to none"),
            ),
            ("fp16", {"stages.0.precision": "fp16"}, ("powersgd with precision fp16", "bf16 or fp32")),
            ("one rank", {"stages.0.gpus_per_node": 1}, ("powersgd with 1 data-parallel rank", "use more ranks")),
            (
                "tensor ranks",
                {"stages.0.parallel": {"tensor": 2}},
                ("powersgd with parallel.tensor 2", "set tensor to 1"),
            ),
            ("pipeline ranks", {"stages.0.parallel": {"pipeline": 2}}, ("powersgd with parallel.pipeline 2",)),
            (
                "a data type",
                {"stages.0.communication": {"powersgd": {}, "data_type": "bf16"}},
                ("both powersgd and data_type bf16", "remove one"),
            ),
            (
                "a start step that is too early",
                {"stages.0.communication": {"powersgd": {"start_step": 1}}},
                ("start_step is 1", "greater than or equal to 2"),
            ),
        )
    ),
    (
        "gradient precision with sequence parallelism",
        {
            "stages.0.communication": {"data_type": "bf16"},
            "stages.0.parallel": {"sequence": 2},
            "stages.0.gpus_per_node": 2,
        },
        {},
        ("data_type with parallel.sequence 2 is not supported", "or remove data_type"),
    ),
    (
        "auxiliary loss in fp16",
        {
            "model": {"qwen3_moe": QWEN3_MOE},
            "stages.0.sequence_aux_loss_coef": 0.001,
            "stages.0.precision": "fp16",
        },
        {},
        ("sequence_aux_loss_coef 0.001 with precision fp16", "bf16 or fp32"),
    ),
    (
        "auxiliary loss of experts in a dense model",
        {"stages.0.sequence_aux_loss_coef": 0.001},
        {},
        ("stages.base.sequence_aux_loss_coef 0.001 has no effect: the model has no routed experts", "remove the key"),
    ),
    (
        "bias of experts in a dense model",
        {"stages.1.router_bias_update_rate": 0.001},
        {},
        ("stages.chat.router_bias_update_rate 0.001 has no effect: the model has no routed experts", "remove the key"),
    ),
    (
        "bias of experts whose routers have none",
        {"model": {"qwen3_moe": QWEN3_MOE}, "stages.0.router_bias_update_rate": 0.001},
        {},
        ("router_bias_update_rate 0.001 has no effect: routers of DeepSeek-V3 alone", "or balance experts with"),
    ),
    (
        "loss scaling without fp16",
        {"stages.0.fp16": {"loss_scale": 128.0}, "stages.0.precision": "bf16"},
        {},
        ("fp16 has no effect with precision bf16; remove it, or set precision to fp16",),
    ),
    (
        "gradients in fp8",
        {"stages.0.communication": {"data_type": "fp8"}},
        {},
        ("communication.data_type is 'fp8'", "'fp32', 'bf16' or 'fp16'"),
    ),
    (
        "experts that ranks cannot split",
        {"model": {"deepseek_v3": DEEPSEEK}, "stages.0.parallel": {"expert": 8}, "stages.0.gpus_per_node": 8},
        {},
        ("parallel.expert 8 does not divide the model's 4 routed experts", "set parallel.expert to 1, 2 or 4"),
    ),
    (
        "expert parallelism for a dense model",
        {"stages.0.parallel": {"expert": 2}, "stages.0.gpus_per_node": 2},
        {},
        ("expert 2: the model has 0 routed experts", "set parallel.expert to 1"),
    ),
    (
        "more expert-parallel than data-parallel ranks",
        {"model": {"deepseek_v3": DEEPSEEK}, "stages.0.parallel": {"expert": 4}, "stages.0.gpus_per_node": 2},
        {},
        ("parallel.expert 4 does not divide the 2 data-parallel ranks", "set parallel.expert to 1 or 2"),
    ),
    (
        "more pipeline ranks than layers",
        {"stages.0.parallel": {"pipeline": 4}, "stages.0.gpus_per_node": 4},
        {},
        ("pipeline 4: the model has 2 layers", "set parallel.pipeline to at most 2"),
    ),
    (
        "first pipeline rank without experts",
        {
            "model": {"deepseek_v3": DEEPSEEK},
            "stages.0.parallel": {"pipeline": 2, "expert": 2},
            "stages.0.gpus_per_node": 4,
        },
        {},
        (
            "pipeline 2 with expert 2: pipeline rank 0 has layers 0 to 0",
            "all dense",
            "set parallel.pipeline to 1, or parallel.expert to 1",
        ),
    ),
    (
        "last pipeline rank without experts",
        {
            "model": {"qwen3_moe": {**QWEN3_MOE, "mlp_only_layers": [2, 3]}},
            "stages.0.parallel": {"pipeline": 2, "expert": 2},
            "stages.0.gpus_per_node": 4,
        },
        {},
        ("pipeline rank 1 has layers 2 to 3, which are all dense", "set parallel.pipeline to 1"),
    ),
    (
        "every second pipeline rank without experts",
        {
            "model": {"qwen3_moe": {**QWEN3_MOE, "decoder_sparse_step": 2}},
            "stages.0.parallel": {"pipeline": 4, "expert": 2},
            "stages.0.gpus_per_node": 8,
        },
        {},
        ("pipeline rank 0 has layers 0 to 0, which are all dense", "set parallel.pipeline to 2"),
    ),
    (
        "pipeline parallelism with ZeRO 2",
        {"stages.0.parallel": {"pipeline": 2}, "stages.0.gpus_per_node": 2, "stages.0.zero": {"stage": 2}},
        {},
        ("parallel.pipeline 2 with ZeRO stage 2", "set zero.stage to 1"),
    ),
    (
        "tensor parallelism with ZeRO 0",
        {"stages.0.parallel": {"tensor": 2}, "stages.0.gpus_per_node": 2, "stages.0.zero": {"stage": 0}},
        {},
        ("tensor 2 with ZeRO stage 0", "set zero.stage to 1, 2 or 3"),
    ),
    (
        "gradients of experts without contiguous buffers",
        {
            "model": {"deepseek_v3": DEEPSEEK},
            "stages.0.parallel": {"expert": 2},
            "stages.0.gpus_per_node": 2,
            "stages.0.zero": {"stage": 1, "contiguous_gradients": False},
        },
        {},
        (
            "zero.contiguous_gradients false with parallel.expert 2: DeepSpeed would average",
            "remove contiguous_gradients",
        ),
    ),
    (
        "hpZ with tensor parallelism",
        {
            "stages.0.parallel": {"tensor": 2},
            "stages.0.gpus_per_node": 4,
            "stages.0.zero": {"stage": 3, "zero_hpz_partition_size": 2},
        },
        {},
        ("zero_hpz_partition_size 2 with parallel.tensor 2 is not supported", "remove zero_hpz"),
    ),
    (
        "sequence parallelism with tensor parallelism",
        {"stages.0.parallel": {"tensor": 2, "sequence": 2}, "stages.0.gpus_per_node": 4},
        {},
        ("sequence 2 with tensor 2 is not supported", "set tensor to 1"),
    ),
    (
        "heads that sequence parallelism cannot split",
        {"stages.0.parallel": {"sequence": 4}, "stages.0.gpus_per_node": 4},
        {},
        ("sequence 4 does not divide the model's num_key_value_heads 2", "set parallel.sequence to 1 or 2"),
    ),
    (
        "sequence length that ranks cannot split",
        {"stages.0.parallel": {"sequence": 2}, "stages.0.gpus_per_node": 2, "stages.0.sequence_length": 63},
        {},
        ("sequence_length 63 is not a multiple of parallel.sequence 2", "use a sequence_length of 62"),
    ),
    (
        "fp16 with tensor parallelism",
        {"stages.0.parallel": {"tensor": 2}, "stages.0.gpus_per_node": 2, "stages.0.precision": "fp16"},
        {},
        ("parallel.tensor 2 with precision fp16 is not supported", "bf16 or fp32"),
    ),
    (
        "hpZ without ZeRO 3",
        {"stages.0.zero": {"stage": 2, "zero_hpz_partition_size": 2}},
        {},
        ("zero_hpz_partition_size 2 needs ZeRO stage 3; it is 2", "set zero.stage to 3"),
    ),
    (
        "hpZ size that does not divide a node",
        {"stages.0.zero": {"stage": 3, "zero_hpz_partition_size": 3}, "stages.0.gpus_per_node": 4},
        {},
        ("zero_hpz_partition_size 3 does not divide the 4 ranks of a node", "use 1, 2 or 4"),
    ),
    (
        "hpZ over two nodes",
        {"stages.0.zero": {"stage": 3, "zero_hpz_partition_size": 4}, "stages.0.gpus_per_node": 2, "stages.0.nodes": 2},
        {},
        ("zero_hpz_partition_size 4 does not divide the 2 ranks of a node", "use 1 or 2"),
    ),
    (
        "fp16 without a GPU",
        {"stages.0.precision": "fp16"},
        {"partitions.0.node.gpus": 0, "accelerator": "cpu"},
        ("stages.base: precision fp16", "site centre", "set precision to bf16 or fp32"),
    ),
    (
        "GPUs with the CPU build of torch",
        {},
        {"accelerator": "cpu"},
        ("partitions.gpu.node.gpus 8 with accelerator cpu", "set accelerator, e.g."),
    ),
    *(
        (
            f"training partition with 0 GPUs and {build}",
            {},
            {"partitions.0.node.gpus": 0, "accelerator": {toolkit: version}},
            (f"partitions.gpu.node.gpus 0 with accelerator {build}", "set node.gpus, or set accelerator to cpu"),
        )
        for toolkit, version, build in (("cuda", "13.0", "cuda 13.0"), ("rocm", "6.4", "rocm 6.4"))
    ),
    (
        "several nodes without a network",
        {},
        {"interconnect": {"kind": "none"}},
        ("partitions.gpu.max_nodes 16 with interconnect.kind none", "change either"),
    ),
    ("unknown CUDA version", {}, {"accelerator": {"cuda": "cu128"}}, ("accelerator.cuda is 'cu128'", "13.0")),
    *(
        (
            f"{key} on AMD GPUs",
            {},
            {"accelerator": {"rocm": "6.4"}, key: value},
            (f"{key} {value} with accelerator rocm 6.4", "only NVIDIA GPUs have NVLinks; remove it"),
        )
        for key, value in (("node_minimums.nvlinks", 4), ("interconnect.nvlink_multicast", "off"))
    ),
    ("unknown accelerator", {}, {"accelerator": "tpu"}, ("accelerator: 'tpu' is no build of torch; write {cuda: ",)),
    (
        "CUDA version that YAML reads as a number",
        {},
        {"accelerator": {"cuda": 13.0}},
        ("accelerator.cuda is 13.0", "in quotes"),
    ),
    (
        "two accelerators",
        {},
        {"accelerator": {"cuda": "13.0", "rocm": "6.4"}},
        ("names both cuda 13.0 and rocm 6.4", "one of them"),
    ),
    # Typing errors and malicious values, found in trials with the role of a user at a centre.
    (
        "number with 400 digits",
        {"stages.0.tokens": 10**400, "stages.0.steps": ...},
        {},
        ("stages.base.tokens is 1000", "…"),
    ),
    ("too many layers", {"model.llama.num_hidden_layers": 10**9}, {}, ("num_hidden_layers is 1000000000", "10000")),
    (
        "very large vocabulary with tensor parallelism",
        {"model.llama.vocab_size": 10**8 - 1, "stages.0.parallel": {"tensor": 2}, "stages.0.gpus_per_node": 2},
        {},
        ("tensor 2 does not divide the model's vocab_size 99999999", "set parallel.tensor to 1"),
    ),
    ("too many nodes", {}, {"partitions.0.max_nodes": 10**12}, ("max_nodes is 1000000000000", "100000")),
    (
        "chunks of size zero",
        {"datasets.prose": {"kind": "text", "python_stdlib": {}, "chunk_mb": 1e-300}},
        {},
        ("chunk_mb is 1e-300",),
    ),
    ("empty path", {"datasets.prose": {"kind": "text", "files": [""]}}, {}, ("files.0 is ''", "not empty")),
    ("no data files", {"datasets.prose": {"kind": "text", "files": []}}, {}, ("exactly one of files, hub",)),
    (
        "home folder of an unknown user",
        {"tokenizer": {"path": "~nobody-at-all/t"}},
        {},
        ("tokenizer.path '~nobody-at-all/t' is not a valid path", "full path"),
    ),
    (
        "path that is too long",
        {"datasets.prose": {"kind": "text", "files": ["a" * 3000]}},
        {},
        ("datasets.prose.files 'aaa", "File name too long"),
    ),
    ("site name that is too long", {"site": "a" * 3000}, {}, ("site: there is no site 'aaa",)),
    ("folder for a template", {"tokenizer.chat_template": "."}, {}, ("tokenizer.chat_template: ", "is not a file")),
    (
        "key that is not a string",
        {"datasets": {True: {"kind": "text"}}},
        {},
        ("datasets.True: key True is not a string", "quote"),
    ),
    (
        "dataset with a reserved name",
        {"datasets.model": {"kind": "text", "python_stdlib": {}}},
        {},
        ("datasets.model: this name is reserved", "rename the dataset"),
    ),
    ("odd head width", {"model.llama.hidden_size": 12}, {}, ("the head width is 3", "even width")),
    (
        "hidden size that heads do not divide",
        {"model.llama.hidden_size": 65},
        {},
        ("hidden_size 65 is not a multiple",),
    ),
    ("unknown rotary scaling", {"model.llama.rope_scaling": {"rope_type": "yarm"}}, {}, ("'yarm'", "yarn")),
    (
        "rotary scaling without a type",
        {"model.llama.rope_scaling": {"factor": 4.0}},
        {},
        ("rope_scaling has factor and no rope_type", "set rope_type"),
    ),
    (
        "rotary scaling that a new model cannot use",
        {"model.llama.rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {},
        ("rope_type dynamic is not for new models", "default, linear, yarn, llama3"),
    ),
    *(
        (f"DeepSeek V2 with {problem}", {"model": {"deepseek_v2": {**DEEPSEEK_V2, **keys}}}, {}, expected)
        for problem, keys, expected in (
            ("an unknown selection", {"topk_method": "best"}, ("topk_method is 'best'", "group_limited_greedy")),
            ("groups that greedy ignores", {"n_group": 2}, ("n_group 2 has no effect with topk_method greedy",)),
            (
                "no groups",
                {"topk_method": "group_limited_greedy"},
                ("group_limited_greedy needs n_group None, a divisor of n_routed_experts 4",),
            ),
            ("scaled router weights", {"norm_topk_prob": True}, ("norm_topk_prob True has no effect", "deepseek_v2")),
        )
    ),
    (
        "one expert per group",
        {"model": {"deepseek_v3": {**DEEPSEEK, "n_group": DEEPSEEK["n_routed_experts"]}}},
        {},
        ("is 1 expert per group", "a group needs at least 2"),
    ),
    (
        "shared keys and values in latent attention",
        {"model": {"deepseek_v3": {**DEEPSEEK, "num_key_value_heads": 2}}},
        {},
        ("num_key_value_heads is 2; with latent attention it must be num_attention_heads, 4",),
    ),
    (
        "more experts per token than experts",
        {"model": {"deepseek_v3": {**DEEPSEEK, "num_experts_per_tok": 5}}},
        {},
        ("num_experts_per_tok 5 is greater than n_routed_experts 4",),
    ),
    (
        "window_batches without roll_back",
        {"stages.0.bad_steps": {"policy": "skip", "window_batches": 2}},
        {},
        ("window_batches 2 has no effect with policy skip", "use roll_back"),
    ),
    (
        "checks longer than the partition allows",
        {"checks.minutes": 2000},
        {},
        ("checks.minutes 2000: partition gpu allows 1440",),
    ),
    (
        "data jobs for an unknown dataset",
        {"data_jobs": {"x": 2}},
        {},
        ("data_jobs: there is no dataset 'x'", "prose, chats"),
    ),
    (
        "data jobs for a mixture",
        {"datasets.m": {"kind": "text", "mixture": {"prose": 1}}, "data_jobs": {"m": 2}},
        {},
        ("data_jobs: m is a mixture", "name the datasets of the mixture"),
    ),
    ("zero data jobs", {"data_jobs": {"prose": 0}}, {}, ("data_jobs.prose is 0",)),
    (
        "data jobs longer than the partition allows",
        {"data_minutes": 2000},
        {},
        ("data_minutes 2000: partition gpu allows 1440",),
    ),
    (
        "option in an account",
        {},
        {"partitions.0.account": "--wrap=id"},
        ("partitions.gpu.account is '--wrap=id'", "starting with a letter"),
    ),
    (
        "option in a module name",
        {},
        {"software": {"kind": "modules", "modules": ["-h"]}},
        ("software.modules.0 is '-h'",),
    ),
    # The Slurm plugin passes these two to a shell without quotes.
    ("shell command in a reservation", {}, {"partitions.0.reservation": "a&reboot"}, ("reservation is 'a&reboot'",)),
    (
        "GPU type with a number",
        {},
        {"partitions.0.gpu_type": "a100:4"},
        ("gpu_type a100:4 contains more than the type",),
    ),
    ("shell command in a GPU type", {}, {"partitions.0.gpu_type": "a100|reboot"}, ("gpu_type is 'a100|reboot'",)),
    (
        "relative path of an environment",
        {},
        {"software": {"kind": "venv", "path": "~/venv"}},
        ("path '~/venv' is not an absolute path", "starts with /"),
    ),
    (
        "option in a bind",
        {},
        {"software": {"kind": "container", "path": "/a.sif", "binds": ["--pwn"]}},
        ("binds '--pwn' is not an absolute path",),
    ),
    (
        "relative path of nccl-tests",
        {},
        {"interconnect.nccl_tests": "nccl-tests/build"},
        ("interconnect", "nccl_tests 'nccl-tests/build' is not an absolute path", "starts with /"),
    ),
    ("reserved variable", {}, {"environment": {"PYTHONPATH": "/x"}}, ("environment sets PYTHONPATH", "remove it")),
    ("variable of a launcher", {}, {"environment": {"WORLD_SIZE": "2"}}, ("environment sets WORLD_SIZE", "remove it")),
    ("reserved srun option", {}, {"srun_extra": ["--nodes=1"]}, ("srun_extra contains --nodes", "remove it")),
    ("fewer cores than GPUs", {}, {"partitions.0.node.cpus": 4}, ("cpus 4 is less than gpus 8",)),
    ("local scheduler with 16 nodes", {}, {"scheduler": "local"}, ("the site is one machine", "with max_nodes 1")),
    (
        "qwZ",
        {"stages.0.zero": {"zero_quantized_weights": True}},
        {},
        ("zero_quantized_weights: ", "(qwZ) is not supported", "remove the key"),
    ),
    (
        "qgZ",
        {"stages.0.zero": {"zero_quantized_gradients": True}},
        {},
        ("zero_quantized_gradients: ", "(qgZ) is not supported", "remove the key"),
    ),
    (
        "ZenFlow",
        {"stages.0.zero": {"zenflow": {"topk_ratio": 0.1}}},
        {},
        ("ZenFlow is not supported", "remove the key"),
    ),
    (
        "fabric limit in MB/s",
        {},
        {"interconnect": {"limits": {"all_reduce_gbps": 400000}}},
        ("all_reduce_gbps", "400000 is above 5,000 GB/s", "write GB/s (1,000 MB/s, or 8 Gbit/s)"),
    ),
    # mistakes that are tried in test_config_remedies.py, too
    (
        "shares of a schedule above 1",
        {"stages.0.schedule": {"kind": "wsd", "warmup_steps": 0.6, "decay_steps": 0.6}},
        {},
        ("stages.base.schedule: warmup_steps 0.6 + decay_steps 0.6 exceed the stage", "reduce them"),
    ),
    (
        "fp8 without a GPU",
        {"stages.0.precision": "fp8"},
        {"partitions.0.node.gpus": 0, "accelerator": "cpu"},
        ("stages.base: precision fp8 on site centre, which has no GPU", "set precision to bf16 or fp32"),
    ),
    (
        "fp8 on AMD GPUs",
        {"stages.0.precision": "fp8"},
        {"accelerator": {"rocm": "7.0"}},
        ("precision fp8 on site centre, which has AMD GPUs", "set precision to bf16"),
    ),
    (
        "fp8 on older GPUs",
        {"stages.0.precision": "fp8"},
        {"partitions.0.gpu_type": "a100"},
        ("precision fp8 on GPUs of type a100", "use a partition with newer GPUs"),
    ),
    (
        "fp8 with a remainder of tokens",
        {"stages.0.precision": "fp8", "stages.0.sequence_length": 60},
        {},
        ("precision fp8 with 60 tokens for each rank and micro batch", "a multiple of 16"),
    ),
    (
        "more GPUs than the only node has",
        {"stages.0.gpus_per_node": 16, "stages.0.global_batch_size": 16},
        {"partitions.0.max_nodes": 1},
        ("stages.base.gpus_per_node 16: site centre has 8 GPUs per node", "remedy: use at most 8\n"),
    ),
    (
        "more processes than cores",
        {"stages.0.gpus_per_node": 65, "stages.0.global_batch_size": 65},
        {"partitions.0.node.gpus": 0, "accelerator": "cpu"},
        ("stages.base.gpus_per_node 65: site centre has 64 CPU cores", "use at most 64"),
    ),
    (
        "minutes that end before a save",
        {"stages.0.minutes": 1, "stages.1.minutes": 60},
        {"checkpoint_write_gb_per_s": 0.1},
        (
            "stages.base.minutes 1: a save of 0.0 GB",
            "set minutes to 2 or more, or recovery.stop_margin_s to at most 59",
        ),
    ),
    (
        "a save that takes longer than the minutes",
        {"stages.0.minutes": 1},
        {"checkpoint_write_gb_per_s": 1e-5},
        ("stages.base.minutes 1: a save of 0.0 GB", "set minutes to 5 or more\n"),
    ),
    (
        "too little memory for auto",
        {"stages.0.micro_batch_size": "auto"},
        {"partitions.0.node.gpu_memory_gib": 0.001},
        ("stages.base: micro_batch_size 1", "GPUs with more memory"),
    ),
    # names
    (
        "mixture of a mixture",
        {
            "datasets.m": {"kind": "text", "mixture": {"prose": 1}},
            "datasets.n": {"kind": "text", "mixture": {"m": 1}},
        },
        {},
        ("datasets.n.mixture: m is a mixture itself", "list the datasets of that mixture"),
    ),
    (
        "tokenizer of chats",
        {"tokenizer.train.datasets": ["chats"]},
        {},
        ("tokenizer.train.datasets: chats is of kind chat", "use datasets of kind text"),
    ),
    # evaluation
    *(
        (f"task file {mistake}", {"stages.1.export": "last", "stages.1.evaluate": evaluate}, {}, expected)
        for mistake, evaluate, expected in (
            ("without a name", _QUIZ, ("quiz.yaml has no key `task`", "a name, data, a metric")),
            ("with code", _QUIZ, ("quiz.yaml has the key include", "write all keys of the task into the file")),
            ("without data", _QUIZ, ("quiz.yaml has no key `dataset_path`", "a repository of the Hub")),
            (
                "with a list of data",
                _QUIZ,
                ("dataset_kwargs is ['a.jsonl'] and no mapping", "{data_files: FILE.jsonl}"),
            ),
            ("with an unknown key", _QUIZ, ("quiz.yaml has the key docs_to_text", "correct or remove it")),
            (
                "without data files",
                _QUIZ,
                ("dataset_path is json, and dataset_kwargs has no data_files", "name them in"),
            ),
            ("with a folder", _QUIZ, ("dataset_path ./data is no repository of the Hub", "use one of")),
            ("with a web page", _QUIZ, ("reads https://a.example/b.jsonl, which has no revision", "download it")),
            ("with two repositories", _QUIZ, ("the data are in a/b@main and c/d@main", "write a task for each")),
            (
                "with a metric alone",
                _QUIZ,
                ("metric_list is 'acc', and no list of items", "write it as [{metric: acc}]"),
            ),
            (
                "with an unknown metric",
                _QUIZ,
                ("the metric rouge is not part of lm_eval", "use metrics of lm_eval: acc,"),
            ),
            ("with a metric of the Hub", _QUIZ, ("hf_evaluate of the metric acc", "remove hf_evaluate")),
            ("with an unknown aggregation", _QUIZ, ("no aggregation sum for the metric acc", "mean")),
            (
                "without its data file",
                _QUIZ,
                ("quiz.yaml reads none.jsonl, which does not exist", "relative to the folder"),
            ),
            ("that nothing names", {**_QUIZ, "tasks": ["arc_easy"]}, ("no task of stages.chat", "add quiz to tasks")),
            (
                "twice",
                {**_QUIZ, "files": ["quiz.yaml", "./quiz.yaml"]},
                ("two files define the task quiz", "change `task` in one of them, and add it to tasks"),
            ),
        )
    ),
    (
        "start model of random weights",
        {"stages.0.export": "last", "stages.0.evaluate": {"tasks": ["arc_easy"], "starting_model": True}},
        {},
        ("stages.base.evaluate.starting_model: the stage starts from random weights", "remove the key"),
    ),
    (
        "start model without an export",
        {"stages.1.export": "last", "stages.1.evaluate": {"tasks": ["arc_easy"], "starting_model": True}},
        {},
        ("the stage starts from the last checkpoint of base, whose export is none", "set stages.base.export to last"),
    ),
    (
        "two evaluations with one name",
        {
            "stages.0.export": "last",
            "stages.0.evaluate": {"tasks": ["trained-quiz"]},
            "stages.1.export": "last",
            "stages.1.name": "base-trained",
            "stages.1.evaluate": {"tasks": ["quiz"]},
        },
        {},
        ("task quiz and task trained-quiz of stage base have the same job name", "another name"),
    ),
    # serving
    *(
        (mistake, {"stages.1.export": "last", **config}, site, expected)
        for mistake, config, site, expected in (
            (
                "evaluation by a server without log probabilities",
                {"stages.1.evaluate": _SERVED},
                {},
                ("stages.chat.evaluate.engine is server", "serving.engine in the site file to vllm or sglang"),
            ),
            (
                "another Python inside of a container",
                {"stages.1.evaluate": _SERVED},
                {"serving": _VLLM, "software": {"kind": "container", "path": "/images/job.sif"}},
                ("inside of the job environment's container, /bin/sh", "use an image with vllm"),
            ),
            (
                "Python of the engine that is missing",
                {"stages.1.serve_check": {}},
                {"serving": {"engine": "vllm", "python": ["/none/python"]}},
                ("serving.python: /none/python is no program", "correct serving.python"),
            ),
            (
                "engine without its package",
                {"stages.1.serve_check": {"answer_tokens": 16}},
                {"serving.engine": "sglang"},
                ("serving.engine sglang needs the package sglang", "set serving.python in the site file to its Python"),
            ),
            (
                "answers of a check longer than the context",
                {"stages.1.serve_check": {"answer_tokens": 40}, "stages.1.serve": {"context": 64}},
                {"serving": _VLLM},
                ("stages.chat.serve_check.answer_tokens 40", "at most 32, or increase serve.context"),
            ),
            (
                "answers of a check longer than the model's positions",
                {"stages.1.serve_check": {"answer_tokens": 97}},
                {"serving": _VLLM},
                ("stages.chat.serve_check.answer_tokens 97", "remedy: set answer_tokens to at most 96\n"),
            ),
            (
                "context longer than the model's positions",
                {"stages.1.serve": {"context": 129}},
                {"serving.engine": "vllm"},
                ("stages.chat.serve.context 129", "set serve.context to at most 128"),
            ),
            (
                "requests at once with transformers",
                {"stages.1.serve": {"max_running_requests": 8}},
                {},
                ("stages.chat.serve.max_running_requests 8: engine transformers", "remove the key"),
            ),
            (
                "expert ranks with transformers",
                {"model": {"deepseek_v3": DEEPSEEK}, "stages.1.serve": {"expert_parallel": True}},
                {},
                ("stages.chat.serve.expert_parallel is true, but engine transformers", "a site with GPUs"),
            ),
            (
                "expert ranks of a dense model",
                {"stages.1.serve": {"expert_parallel": True}},
                {"serving.engine": "vllm"},
                ("stages.chat.serve.expert_parallel is true, but the model has no experts", "remove the key"),
            ),
            (
                "server on more nodes than the site has",
                {"stages.1.serve": {"nodes": 17}},
                {"serving.engine": "vllm"},
                ("stages.chat.serve.nodes 17 exceeds the limit", "set serve.nodes to at most 16"),
            ),
            (
                "server for longer than the partition allows",
                {"stages.1.serve": {"minutes": 1441}},
                {"serving.engine": "vllm"},
                ("stages.chat.serve.minutes 1441 exceeds max_minutes 1440", "set serve.minutes to at most 1440"),
            ),
            (
                "server with more ranks than layers",
                {"stages.1.serve": {"nodes": 2}},
                {"serving.engine": "vllm"},
                ("2 layers for pipeline ranks", "remedy: set serve.gpus_per_node to 4 or serve.nodes to 1\n"),
            ),
            (
                "server with more nodes than layers",
                {"stages.1.serve": {"nodes": 16, "gpus_per_node": 7}},
                {"serving.engine": "vllm"},
                ("2 layers for pipeline ranks", "set serve.nodes to 1 and serve.gpus_per_node to 4"),
            ),
            (
                "weights larger than the GPUs of a server",
                {"stages.1.serve": {"nodes": 1, "gpus_per_node": 1, "context": 64}, **_WIDE, **_OFFLOAD},
                {"serving.engine": "vllm", "partitions.0.node.gpu_memory_gib": 0.008},
                (
                    "the weights are 0.0 GiB on the fullest GPU",
                    "remedy: set serve.nodes to 2, or set export_dtype to fp8\n",
                ),
            ),
            (
                "KV cache larger than the GPUs of a server",
                {"stages.1.serve": {"nodes": 1, "gpus_per_node": 1, "concurrency": 300}},
                {"serving.engine": "vllm", "partitions.0.node.gpu_memory_gib": 0.01, "partitions.0.max_nodes": 1},
                ("product is at most 32575, or remove serve.gpus_per_node and set serve.nodes to 1",),
            ),
            (
                "weights larger than the memory of the only node",
                {"stages.1.serve": {}, **_WIDE},
                {
                    "serving.engine": "vllm",
                    "partitions.0.node.gpus": 0,
                    "accelerator": "cpu",
                    "partitions.0.node.memory_mb": 2,
                },
                ("the weights are", "use a site with more nodes, or more memory in each"),
            ),
            (
                "biases that an engine leaves out",
                {"model.llama.mlp_bias": True, "stages.1.serve": {}},
                {"serving.engine": "sglang"},
                ("sglang cannot serve this model: it leaves out biases", "to vllm or transformers"),
            ),
            (
                "tied embeddings on pipeline ranks",
                {"model.llama.tie_word_embeddings": True, "stages.1.serve": {"nodes": 2, "gpus_per_node": 4}},
                {"serving.engine": "sglang"},
                ("sglang cannot serve a llama with tie_word_embeddings on 2", "set serve.nodes to 1"),
            ),
            (
                "factors that an engine does not read",
                {"stages.1.export_dtype": "fp8", "stages.1.serve": {}, **_WIDE},
                {"serving.engine": "sglang"},
                ("SGLang reads no factors of blocks for a llama", "set export_dtype to bf16, or serving.engine"),
            ),
            (
                "matrices with a part of a block",
                {"stages.1.export_dtype": "fp8", "stages.1.serve": {}},
                {"serving.engine": "sglang"},
                ("num_attention_heads x head_dim is 64, no multiple", "set export_dtype to bf16"),
            ),
        )
    ),
]

_TASK = "task: quiz\ndataset_path: a/b\n"
FILES: dict[str, dict[str, str]] = {
    "task file without a name": {"quiz.yaml": "dataset_path: a/b\n"},
    "task file with code": {"quiz.yaml": f"{_TASK}include: other.yaml\n"},
    "task file without data": {"quiz.yaml": "task: quiz\n"},
    "task file with a list of data": {"quiz.yaml": f"{_TASK}dataset_kwargs: [a.jsonl]\n"},
    "task file with an unknown key": {"quiz.yaml": f"{_TASK}docs_to_text: a\n"},
    "task file without data files": {"quiz.yaml": "task: quiz\ndataset_path: json\n"},
    "task file with a folder": {"quiz.yaml": "task: quiz\ndataset_path: ./data\n"},
    "task file with a web page": {"quiz.yaml": f"{_TASK}dataset_kwargs: {{data_files: https://a.example/b.jsonl}}\n"},
    "task file with two repositories": {
        "quiz.yaml": f"{_TASK}dataset_kwargs: {{data_files: [x.jsonl, hf://datasets/c/d/x.jsonl]}}\n"
    },
    "task file with a metric alone": {"quiz.yaml": f"{_TASK}metric_list: acc\n"},
    "task file with an unknown metric": {"quiz.yaml": f"{_TASK}metric_list: [{{metric: rouge}}]\n"},
    "task file with a metric of the Hub": {"quiz.yaml": f"{_TASK}metric_list: [{{metric: acc, hf_evaluate: true}}]\n"},
    "task file with an unknown aggregation": {
        "quiz.yaml": f"{_TASK}metric_list: [{{metric: acc, aggregation: sum}}]\n"
    },
    "task file without its data file": {
        "quiz.yaml": "task: quiz\ndataset_path: json\ndataset_kwargs: {data_files: none.jsonl}\n"
    },
    "task file that nothing names": {"quiz.yaml": _TASK},
    "task file twice": {"quiz.yaml": _TASK},
}
"""Files beside the config, for mistakes in them: name of the mistake -> path -> text."""
