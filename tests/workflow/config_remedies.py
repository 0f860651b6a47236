"""Changes that follow the remedy of each mistake in bad_configs.py, one for each alternative that the remedy names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.workflow.bad_configs import stages


@dataclass(frozen=True)
class Remedy:
    """One alternative of a remedy.

    says:   the part of the remedy's text that names it
    config: changes of the bad config
    site:   changes of the bad site file
    files:  path relative to the config -> text of a file that is written
    """

    says: str
    config: dict[Any, Any] = field(default_factory=dict)
    site: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


_PRECISIONS = [Remedy(f"{name}", {"stages.0.precision": name}) for name in ("bf16", "fp32")]
_SCRATCH = [Remedy("set storage.scratch to a folder", {"storage.scratch": "/local"})]
_TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
_PROSE = {"prose.txt": "One document.\n"}
_NO_TENSOR = Remedy("set parallel.tensor to 1", {"stages.0.parallel.tensor": 1})
_NO_EXPERT = Remedy("parallel.expert to 1", {"stages.0.parallel.expert": 1})
_NO_POWERSGD = Remedy("remove powersgd", {"stages.0.communication.powersgd": None})
_MINUTES = "use at most 1440 minutes"
_NODES = "correct max_nodes of the partition in the site file"

_OFFLOAD = {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}

_ON_8_GPUS = [{f"stages.{index}.zero": {"stage": 3}, f"stages.{index}.gpus_per_node": 8} for index in (0, 1)]

_PYTHON = {"python": ["/bin/sh"]}
_OF_THIS_MACHINE = "dataset_kwargs: {data_files: {test: quiz.jsonl}}"
_OF_THE_HUB = "dataset_kwargs: {data_files: hf://datasets/a/b/x.jsonl}"


def _quiz(*lines: str) -> dict[str, str]:
    """Return a task file with these lines; its data are in a repository of the Hub unless a line says otherwise."""
    data = () if any(line.startswith("dataset_path") for line in lines) else ("dataset_path: a/b",)
    return {"quiz.yaml": "\n".join(("task: quiz", *data, *lines, "")), "quiz.jsonl": '{"text": "One question."}\n'}


REMEDIES: dict[str, list[Remedy]] = {
    # names
    "mixture with an unknown dataset": [Remedy("use some of prose", {"datasets.m.mixture": {"prose": 1}})],
    "mixture of datasets of two kinds": [Remedy("mix datasets of one kind", {"datasets.m.kind": "chat"})],
    "two stages with one name": [Remedy("give each stage a different name", {"stages.1.name": "second"})],
    "start from an unknown stage": [Remedy("use one of base", {"stages.1.from.stage": "base"})],
    "a cycle of stages": [Remedy("remove `from` in one", {"stages.0.from": ...})],
    "unknown dataset": [Remedy("use one of prose", {"stages.0.dataset": "prose"})],
    "tokenizer of an unknown dataset": [Remedy("use one of prose", {"tokenizer.train.datasets": ["prose"]})],
    "data jobs for an unknown dataset": [Remedy("use some of prose", {"data_jobs": {"prose": 2}})],
    "data jobs for a mixture": [Remedy("name the datasets of the mixture", {"data_jobs": {"prose": 2}})],
    "dataset with a reserved name": [
        Remedy("rename the dataset", {"datasets.model": ..., "datasets.models": {"kind": "text", "python_stdlib": {}}})
    ],
    "unknown site": [
        Remedy("use one of alps-clariden", {"site": "slurm-generic", "stages": stages({"minutes": 60})}),
        Remedy("the path of a site file", {"site": "./site.yaml"}),
    ],
    "site name that is too long": [Remedy("the path of a site file", {"site": "./site.yaml"})],
    "missing site file": [Remedy("correct './moon.yaml'", {"site": "./site.yaml"})],
    "key that is not a string": [
        Remedy(
            "quote the key",
            {
                "datasets": {"true": {"kind": "text", "python_stdlib": {}}},
                "stages": stages({"dataset": "true"}),
                "tokenizer.train.datasets": ["true"],
            },
        )
    ],
    # files
    "missing data file": [Remedy("relative to the config file", {"datasets.prose.files": ["prose.txt"]}, {}, _PROSE)],
    "data file of an unknown format": [
        Remedy("set `format`", {"datasets.prose.format": "text"}),
        Remedy("use one of .arrow", {"datasets.prose.files": ["prose.txt"]}, {}, _PROSE),
    ],
    "data files ~": [Remedy("name a folder", {"datasets.prose.files": ["only"]}, {}, {"only/prose.txt": "One.\n"})],
    "data files /": [Remedy("name a folder", {"datasets.prose.files": ["only"]}, {}, {"only/prose.txt": "One.\n"})],
    "data files a**b": [
        Remedy("write ** between slashes", {"datasets.prose.files": ["a/**/*.txt"]}, {}, {"a/b/prose.txt": "One.\n"})
    ],
    "path that is too long": [Remedy("a readable file", {"datasets.prose.files": ["prose.txt"]}, {}, _PROSE)],
    "missing evaluation files": [
        Remedy("relative to the config file", {}, {}, {"evals/quiz.jsonl": '{"text": "One question."}\n'})
    ],
    "a file as storage folder": [Remedy("a new path", {"storage.weights": "./weights"})],
    "home as storage folder": [Remedy("write the full path", {"storage.data": "/scratch/data"})],
    "folder for a template": [
        Remedy(
            "the path of a Jinja file",
            {"tokenizer.chat_template": "chat.jinja"},
            {},
            {"chat.jinja": _TEMPLATE},
        )
    ],
    # sizes
    "tokenizer larger than the vocabulary": [
        Remedy("at most 400", {"tokenizer.train.vocab_size": 400}),
        Remedy("increase the model's vocab_size", {"model.llama.vocab_size": 500}),
    ],
    "global batch that does not divide": [
        Remedy("use a global_batch_size of 6", {"stages.0.global_batch_size": 6}),
        Remedy("another micro_batch_size", {"stages.0.micro_batch_size": 4}),
    ],
    "warm-up longer than the training": [
        Remedy("reduce them", {"stages.0.schedule.warmup_steps": 10}),
        Remedy("shares of the steps such as 0.03", {"stages.0.schedule.warmup_steps": 0.03}),
        Remedy("train for more steps", {"stages.0.steps": 11}),
    ],
    "profile beyond the training": [Remedy("profile steps up to 10", {"stages.0.profile_steps": [9, 10]})],
    "wsd without decay": [Remedy("use 10 to 20 % of the steps", {"stages.0.schedule.decay_steps": 0.2})],
    "decay without wsd": [
        Remedy("remove decay_steps", {"stages.0.schedule": {}}),
        Remedy("use kind wsd", {"stages.0.schedule.kind": "wsd"}),
    ],
    "sequence longer than the positions": [
        Remedy("use at most 128", {"stages.0.sequence_length": 128}),
        Remedy("increase max_position_embeddings", {"model.llama.max_position_embeddings": 256}),
    ],
    "tokens for too many steps": [
        Remedy("reduce tokens", {"stages.0.tokens": 10**6}),
        Remedy("increase global_batch_size", {"stages.0.global_batch_size": 8 * 10**6}),
    ],
    "best checkpoint without validation": [
        Remedy("a validation_fraction above 0", {"datasets.chats.validation_fraction": 0.1}),
        Remedy("use the last checkpoint", {"stages.1.export": "last"}),
    ],
    "best checkpoint that is not kept": [Remedy("set keep_best to 1", {"stages.1.checkpoints.keep_best": 1})],
    "text dataset for sft": [
        Remedy("use a dataset of kind chat", {"stages.0.dataset": "chats"}),
        Remedy("change the stage's kind", {"stages.0.kind": "pretrain"}),
    ],
    # the site's limits
    "more GPUs than a node has": [
        Remedy("use at most 8", {"stages.0.gpus_per_node": 8}),
        Remedy("on more nodes", {"stages.0.gpus_per_node": 8, "stages.0.nodes": 2, "stages.0.global_batch_size": 16}),
    ],
    "checks on more GPUs than a node has": [
        Remedy("use at most 8", {"checks.gpus_per_node": 8}),
        Remedy("on more nodes", {"checks.gpus_per_node": 8, "checks.nodes": 2}),
    ],
    "more nodes than the site has": [
        Remedy("use at most 16 nodes", {"stages.0.nodes": 16, "stages.0.global_batch_size": 16}),
        Remedy(_NODES, {"stages.0.global_batch_size": 17}, {"partitions.0.max_nodes": 17}),
    ],
    "checks on more nodes than the site has": [
        Remedy("use at most 16 nodes", {"checks.nodes": 16}),
        Remedy(_NODES, {}, {"partitions.0.max_nodes": 17}),
    ],
    "longer than the partition allows": [Remedy(_MINUTES, {"stages.0.minutes": 1440})],
    "longer than the partition allows, as a duration": [Remedy(_MINUTES, {"stages.0.minutes": "1-00:00:00"})],
    "checks longer than the partition allows": [Remedy(_MINUTES, {"checks.minutes": 1440})],
    "data jobs longer than the partition allows": [Remedy(_MINUTES, {"data_minutes": 1440})],
    "more files than the quota": [
        Remedy("keep at most 2", {f"stages.{index}.checkpoints": {"keep_last": 1, "keep_best": 1} for index in (0, 1)})
    ],
    "fewer files than two checkpoints need": [Remedy("set inode_limit", {}, {"inode_limit": 1000})],
    "more chunk files than the quota": [Remedy("set chunk_mb to 1 or more", {"datasets.chats.chunk_mb": 1})],
    # memory and precision
    "auto without the memory of a GPU": [
        Remedy("set node.gpu_memory_gib of the partition", {}, {"partitions.0.node.gpu_memory_gib": 80}),
        Remedy("write micro_batch_size", {"stages.0.micro_batch_size": 1}),
    ],
    "more memory than a GPU has": [
        Remedy("zero.offload_param to cpu", {f"stages.{index}.zero": _OFFLOAD for index in (0, 1)}),
        Remedy("use 8 GPUs with zero.stage 3", {**_ON_8_GPUS[0], **_ON_8_GPUS[1]}),
    ],
    "fp16 without a GPU": _PRECISIONS,
    "auxiliary loss of experts in a dense model": [
        Remedy("remove the key", {"stages.0.sequence_aux_loss_coef": ...}),
    ],
    "bias of experts in a dense model": [Remedy("remove the key", {"stages.1.router_bias_update_rate": ...})],
    "bias of experts whose routers have none": [
        Remedy("remove the key", {"stages.0.router_bias_update_rate": ...}),
        Remedy(
            "or balance experts with sequence_aux_loss_coef",
            {"stages.0.router_bias_update_rate": ..., "stages.0.sequence_aux_loss_coef": 0.001},
        ),
    ],
    "auxiliary loss in fp16": _PRECISIONS,
    "fp16 with tensor parallelism": _PRECISIONS,
    "weights on disk in fp16": _PRECISIONS,
    "PowerSGD with fp16": _PRECISIONS,
    "bf16 at ZeRO 0": [Remedy("set zero.stage to 1", {"stages.0.zero.stage": 1})],
    "offload at ZeRO 0": [Remedy("1, 2 or 3", {"stages.0.zero.stage": stage}) for stage in (1, 2, 3)],
    "weights offloaded at ZeRO 1": [
        Remedy("set zero.stage to 3", {"stages.0.zero.stage": 3}),
        Remedy("offload only the optimizer", {"stages.0.zero": {"offload_optimizer": "cpu"}}),
    ],
    "optimizer on disk at ZeRO 2": [
        Remedy("set zero.stage to 3", {"stages.0.zero.stage": 3}),
        Remedy("zero.offload_optimizer to cpu", {"stages.0.zero.offload_optimizer": "cpu"}),
    ],
    "optimizer on disk without a scratch folder": _SCRATCH,
    "weights on disk without a scratch folder": _SCRATCH,
    "optimizer on disk with hpZ": [Remedy("remove zero_hpz", {"stages.0.zero.zero_hpz_partition_size": ...})],
    "weights on disk with the optimizer on the GPU": [
        Remedy("zero.offload_optimizer to cpu or nvme", {"stages.0.zero.offload_optimizer": place})
        for place in ("cpu", "nvme")
    ],
    "weights on disk with tensor parallelism": [_NO_TENSOR],
    "weights on disk with a reuse distance": [
        Remedy("remove stage3_max_reuse_distance", {"stages.0.zero.stage3_max_reuse_distance": ...})
    ],
    "weights on disk with a persistence threshold that keeps them whole": [
        Remedy("at most 524286", {"stages.0.zero.stage3_param_persistence_threshold": 524286}),
        Remedy("or remove it", {"stages.0.zero.stage3_param_persistence_threshold": ...}),
    ],
    # layouts
    "parallel axes larger than the ranks": [
        Remedy("use a product of 1 or 2", {"stages.0.parallel": {"tensor": 2}}),
        Remedy("a multiple of 4", {"stages.0.gpus_per_node": 4}),
    ],
    "heads that tensor parallelism cannot split": [
        Remedy("set parallel.tensor to 1 or 2", {"stages.0.parallel.tensor": tensor}) for tensor in (1, 2)
    ],
    "vocabulary that tensor parallelism cannot split": [
        _NO_TENSOR,
        Remedy("pad vocab_size", {"model.llama.vocab_size": 402}),
    ],
    "very large vocabulary with tensor parallelism": [
        _NO_TENSOR,
        Remedy("pad vocab_size", {"model.llama.vocab_size": 100_000_000}),
    ],
    "experts that ranks cannot split": [
        Remedy("set parallel.expert to 1, 2 or 4", {"stages.0.parallel.expert": expert}) for expert in (1, 2, 4)
    ],
    "expert parallelism for a dense model": [_NO_EXPERT],
    "more expert-parallel than data-parallel ranks": [
        Remedy("set parallel.expert to 1 or 2", {"stages.0.parallel.expert": expert}) for expert in (1, 2)
    ],
    "more pipeline ranks than layers": [Remedy("parallel.pipeline to at most 2", {"stages.0.parallel.pipeline": 2})],
    "first pipeline rank without experts": [
        Remedy("set parallel.pipeline to 1", {"stages.0.parallel.pipeline": 1}),
        _NO_EXPERT,
    ],
    "last pipeline rank without experts": [
        Remedy("set parallel.pipeline to 1", {"stages.0.parallel.pipeline": 1}),
        _NO_EXPERT,
    ],
    "every second pipeline rank without experts": [
        Remedy("set parallel.pipeline to 2", {"stages.0.parallel.pipeline": 2}),
        _NO_EXPERT,
    ],
    "pipeline parallelism with ZeRO 2": [
        Remedy("set zero.stage to 1", {"stages.0.zero.stage": 1}),
        Remedy("parallel.pipeline to 1", {"stages.0.parallel.pipeline": 1}),
    ],
    "tensor parallelism with ZeRO 0": [
        *(Remedy("1, 2 or 3", {"stages.0.zero.stage": stage}) for stage in (1, 2, 3)),
        Remedy("tensor to 1", {"stages.0.parallel.tensor": 1}),
    ],
    "hpZ with tensor parallelism": [Remedy("remove zero_hpz", {"stages.0.zero.zero_hpz_partition_size": ...})],
    "gradients of experts without contiguous buffers": [
        Remedy("remove contiguous_gradients", {"stages.0.zero.contiguous_gradients": ...}),
        Remedy("set parallel.expert to 1", {"stages.0.parallel.expert": 1}),
    ],
    "hpZ without ZeRO 3": [
        Remedy("set zero.stage to 3", {"stages.0.zero.stage": 3, "stages.0.gpus_per_node": 2}),
        Remedy("remove the key", {"stages.0.zero.zero_hpz_partition_size": ...}),
    ],
    "hpZ size that does not divide a node": [
        Remedy("use 1, 2 or 4", {"stages.0.zero.zero_hpz_partition_size": size}) for size in (1, 2, 4)
    ],
    "hpZ over two nodes": [Remedy("use 1 or 2", {"stages.0.zero.zero_hpz_partition_size": size}) for size in (1, 2)],
    "sequence parallelism with tensor parallelism": [Remedy("set tensor to 1", {"stages.0.parallel.tensor": 1})],
    "heads that sequence parallelism cannot split": [
        Remedy("set parallel.sequence to 1 or 2", {"stages.0.parallel.sequence": ranks}) for ranks in (1, 2)
    ],
    "sequence length that ranks cannot split": [
        Remedy("use a sequence_length of 62", {"stages.0.sequence_length": 62})
    ],
    "gradient precision with sequence parallelism": [
        Remedy("set sequence to 1", {"stages.0.parallel.sequence": 1}),
        Remedy("remove data_type", {"stages.0.communication": {}}),
    ],
    # PowerSGD
    "optimizer on disk with PowerSGD": [
        Remedy("use communication.data_type bf16", {"stages.0.communication": {"data_type": "bf16"}})
    ],
    "PowerSGD with ZeRO 2": [
        Remedy("set zero.stage to 1", {"stages.0.zero.stage": 1}),
        Remedy("use communication.data_type bf16", {"stages.0.communication": {"data_type": "bf16"}}),
    ],
    "PowerSGD with offload": [Remedy("zero.offload_optimizer to none", {"stages.0.zero.offload_optimizer": "none"})],
    "PowerSGD with one rank": [_NO_POWERSGD, Remedy("use more ranks", {"stages.0.gpus_per_node": 2})],
    "PowerSGD with tensor ranks": [Remedy("set tensor to 1", {"stages.0.parallel.tensor": 1}), _NO_POWERSGD],
    "PowerSGD with pipeline ranks": [Remedy("set pipeline to 1", {"stages.0.parallel.pipeline": 1}), _NO_POWERSGD],
    "PowerSGD with a data type": [
        Remedy("remove one of them", {"stages.0.communication.powersgd": None}),
        Remedy("remove one of them", {"stages.0.communication.data_type": ...}),
    ],
    # schedule, precision, memory
    "shares of a schedule above 1": [
        Remedy("reduce them", {"stages.0.schedule.warmup_steps": 0.1, "stages.0.schedule.decay_steps": 0.2})
    ],
    "fp8 without a GPU": _PRECISIONS,
    "fp8 on AMD GPUs": [Remedy("set precision to bf16", {"stages.0.precision": "bf16"})],
    "fp8 on older GPUs": [
        Remedy("set precision to bf16", {"stages.0.precision": "bf16"}),
        Remedy("use a partition with newer GPUs", {}, {"partitions.0.gpu_type": "h100"}),
    ],
    "fp8 with a remainder of tokens": [
        Remedy("make micro_batch_size times sequence_length a multiple of 16", keys)
        for keys in ({"stages.0.sequence_length": 64}, {"stages.0.micro_batch_size": 4})
    ],
    "more GPUs than the only node has": [Remedy("use at most 8", {"stages.0.gpus_per_node": 8})],
    "more processes than cores": [
        Remedy("use at most 64", {"stages.0.gpus_per_node": 64, "stages.0.global_batch_size": 64})
    ],
    "minutes that end before a save": [
        Remedy("set minutes to 2 or more", {"stages.0.minutes": 2}),
        Remedy("recovery.stop_margin_s to at most 59", {"stages.0.recovery.stop_margin_s": 59}),
    ],
    "a save that takes longer than the minutes": [
        Remedy("set minutes to 5 or more", {"stages.0.minutes": 5, "stages.1.minutes": 5})
    ],
    "too little memory for auto": [
        Remedy("GPUs with more memory", {}, {"partitions.0.node.gpu_memory_gib": 80}),
    ],
    "mixture of a mixture": [
        Remedy("list the datasets of that mixture, with weights multiplied", {"datasets.n.mixture": {"prose": 1}})
    ],
    "tokenizer of chats": [Remedy("use datasets of kind text", {"tokenizer.train.datasets": ["prose"]})],
    # evaluation
    "task file without a name": [Remedy("a name, data, a metric", files=_quiz("metric_list: [{metric: acc}]"))],
    "task file with code": [Remedy("write all keys of the task into the file", files=_quiz('doc_to_text: "{{text}}"'))],
    "task file without data": [
        Remedy("a repository of the Hub", files=_quiz()),
        Remedy("json", files=_quiz("dataset_path: json", _OF_THE_HUB)),
    ],
    "task file with a list of data": [
        Remedy("{data_files: FILE.jsonl}", files=_quiz("dataset_kwargs: {data_files: a.jsonl}"))
    ],
    "task file with an unknown key": [
        Remedy("correct or remove it", files=_quiz("doc_to_text: a")),
        Remedy("correct or remove it", files=_quiz()),
    ],
    "task file without data files": [
        Remedy(
            "name them in dataset_kwargs.data_files",
            files=_quiz("dataset_path: json", "test_split: test", _OF_THIS_MACHINE),
        )
    ],
    "task file with a folder": [
        Remedy(
            "name them in dataset_kwargs.data_files",
            files=_quiz("dataset_path: json", "test_split: test", _OF_THIS_MACHINE),
        )
    ],
    "task file with a web page": [
        Remedy(
            "download it and give the path", files=_quiz("dataset_path: json", "test_split: test", _OF_THIS_MACHINE)
        ),
        Remedy("name a file of the Hub", files=_quiz("dataset_path: json", _OF_THE_HUB)),
    ],
    "task file with two repositories": [
        Remedy("write a task for each repository", files=_quiz("dataset_kwargs: {data_files: x.jsonl}")),
        Remedy(
            "download the files, and name them", files=_quiz("dataset_path: json", "test_split: test", _OF_THIS_MACHINE)
        ),
    ],
    "task file with a metric alone": [
        Remedy("write it as [{metric: acc}]", files=_quiz("metric_list: [{metric: acc}]"))
    ],
    "task file with an unknown metric": [
        Remedy("use metrics of lm_eval: acc", files=_quiz("metric_list: [{metric: acc}]"))
    ],
    "task file with a metric of the Hub": [Remedy("remove hf_evaluate", files=_quiz("metric_list: [{metric: acc}]"))],
    "task file with an unknown aggregation": [
        Remedy("mean", files=_quiz("metric_list: [{metric: acc, aggregation: mean}]"))
    ],
    "task file without its data file": [
        Remedy(
            "give the path of the data file", files=_quiz("dataset_path: json", "test_split: test", _OF_THIS_MACHINE)
        )
    ],
    "task file that nothing names": [
        Remedy("add quiz to tasks", {"stages.1.evaluate.tasks": ["arc_easy", "quiz"]}),
        Remedy("remove the file", {"stages.1.evaluate.files": []}),
    ],
    "task file twice": [
        Remedy(
            "change `task` in one of them, and add it to tasks",
            {"stages.1.evaluate.tasks": ["quiz", "other"], "stages.1.evaluate.files": ["quiz.yaml", "other.yaml"]},
            files={"other.yaml": "task: other\ndataset_path: a/b\n"},
        )
    ],
    "start model of random weights": [Remedy("remove the key", {"stages.0.evaluate.starting_model": ...})],
    "start model without an export": [
        Remedy("set stages.base.export to last", {"stages.0.export": "last"}),
        Remedy("remove the key", {"stages.1.evaluate.starting_model": ...}),
    ],
    "two evaluations with one name": [Remedy("give one of the two stages another name", {"stages.1.name": "chat"})],
    # serving
    "evaluation by a server without log probabilities": [
        *(Remedy(name, {}, {"serving": _PYTHON | {"engine": name}}) for name in ("vllm", "sglang")),
        Remedy("remove the key", {"stages.1.evaluate.engine": ...}),
    ],
    "another Python inside of a container": [
        Remedy("use an image with vllm and remove serving.python", {}, {"serving.python": ...}),
        Remedy("remove the key", {"stages.1.evaluate.engine": ...}),
    ],
    "Python of the engine that is missing": [Remedy("correct serving.python", {}, {"serving.python": ["/bin/sh"]})],
    "engine without its package": [
        Remedy("set serving.python in the site file to its Python", {}, {"serving.python": ["/bin/sh"]})
    ],
    "answers of a check longer than the context": [
        Remedy("set answer_tokens to at most 32", {"stages.1.serve_check.answer_tokens": 32}),
        Remedy("increase serve.context", {"stages.1.serve.context": 72}),
    ],
    "answers of a check longer than the model's positions": [
        Remedy("set answer_tokens to at most 96", {"stages.1.serve_check.answer_tokens": 96})
    ],
    "context longer than the model's positions": [
        Remedy("set serve.context to at most 128", {"stages.1.serve.context": 128})
    ],
    "requests at once with transformers": [
        Remedy("remove the key", {"stages.1.serve": {}}),
        *(Remedy(name, {}, {"serving.engine": name}) for name in ("vllm", "sglang")),
    ],
    "expert ranks with transformers": [
        Remedy("remove the key", {"stages.1.serve": {}}),
        *(Remedy(f"{name}", {}, {"serving.engine": name}) for name in ("vllm", "sglang")),
    ],
    "expert ranks of a dense model": [Remedy("remove the key", {"stages.1.serve": {}})],
    "server on more nodes than the site has": [
        Remedy("set serve.nodes to at most 16", {"stages.1.serve.nodes": 16, "model.llama.num_hidden_layers": 32})
    ],
    "server for longer than the partition allows": [
        Remedy("set serve.minutes to at most 1440", {"stages.1.serve.minutes": 1440})
    ],
    "server with more ranks than layers": [
        Remedy("set serve.gpus_per_node to 4", {"stages.1.serve.gpus_per_node": 4}),
        Remedy("serve.nodes to 1", {"stages.1.serve.nodes": 1}),
    ],
    "server with more nodes than layers": [
        Remedy(
            "set serve.nodes to 1 and serve.gpus_per_node to 4", {"stages.1.serve": {"nodes": 1, "gpus_per_node": 4}}
        )
    ],
    "weights larger than the GPUs of a server": [
        Remedy("set serve.nodes to 2", {"stages.1.serve.nodes": 2}),
        Remedy("set export_dtype to fp8", {"stages.1.export_dtype": "fp8"}),
    ],
    "KV cache larger than the GPUs of a server": [
        Remedy("so that their product is at most", {"stages.1.serve.concurrency": 254}),
        Remedy("remove serve.gpus_per_node and set serve.nodes to 1", {"stages.1.serve.gpus_per_node": ...}),
    ],
    "weights larger than the memory of the only node": [
        Remedy("more memory in each", {}, {"partitions.0.node.memory_mb": 4000})
    ],
    "biases that an engine leaves out": [
        Remedy(name, {}, {"serving.engine": name}) for name in ("vllm", "transformers")
    ],
    "tied embeddings on pipeline ranks": [
        Remedy("set serve.nodes to 1 and serve.gpus_per_node to a divisor", {"stages.1.serve.nodes": 1}),
        Remedy("serving.engine in the site file to vllm", {}, {"serving.engine": "vllm"}),
    ],
    "factors that an engine does not read": [
        Remedy("set export_dtype to bf16", {"stages.1.export_dtype": "bf16"}),
        Remedy("serving.engine in the site file to vllm", {}, {"serving.engine": "vllm"}),
    ],
    "matrices with a part of a block": [Remedy("set export_dtype to bf16", {"stages.1.export_dtype": "bf16"})],
}
