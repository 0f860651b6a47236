"""Chooses the layout of a server: tensor-parallel ranks inside a node, pipeline ranks across nodes; refuses what does not fit.
Pure: nothing is started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.hub_tensors import FP8_BLOCK
from longhaul.config.parameter_counts import (
    expert_counts,
    has_latent_attention,
    head_dim,
    key_value_heads,
    sparse_layers,
)
from longhaul.config.serve_config import Serve
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.gpu_memory import GIB
from longhaul.planning.served_architectures import check_network, check_pipeline, mlp_widths
from longhaul.planning.serving_memory import (
    ExportDtype,
    ServedModel,
    ServingLayout,
    ServingMemory,
    usable_bytes,
)

_ANOTHER_ENGINE = "set serving.engine in the site file to vllm or sglang, which spread a model over GPUs"


@dataclass(frozen=True)
class ServingPlan:
    """The plan of a server.

    context:    longest request, in tokens
    concurrency: requests of this length that the KV cache must hold at once
    gpu_bytes:  memory of one GPU, on a site without GPUs of one node; None: the site file does not state it
    """

    layout: ServingLayout
    memory: ServingMemory
    context: int
    concurrency: int
    minutes: int
    gpu_bytes: float | None

    @property
    def kv_cache_tokens(self) -> int | None:
        """Number of tokens that fit into the KV cache; None if the site file states no memory."""
        return None if self.gpu_bytes is None else self.memory.tokens_that_fit(self.gpu_bytes)

    @property
    def needed_bytes(self) -> int:
        """Bytes of weights and of the required KV cache on the fullest GPU."""
        return self.memory.weights + self.memory.token * self.context * self.concurrency


def plan_serving(stage: Stage, model: HuggingFaceConfig, site: Site) -> ServingPlan:
    """Return the plan of a stage's server: the smallest allocation that fits, or the one that `serve` names.

    model: the trained model's Hugging Face config

    Raises:
        UserError: the model or its KV cache does not fit into the allocation, the context is longer than the model, or the engine
            or the model has nothing for a key.
    """
    serve = stage.serve or Serve()
    _check_context(stage, serve, model)
    _check_keys_of_engines(stage, serve, model, site)
    check_network(stage, model, site.serving.engine, serve.context or model["max_position_embeddings"])
    _check_allocation(stage, serve, site)
    served = ServedModel(model, stage.export_dtype, caches_latents=spreads_models(site))
    plan = None
    for plan in _plans(serve, served, site):
        if _fits(plan):
            check_pipeline(stage, model, site.serving.engine, plan.layout.pipeline)
            return plan
    raise _no_layout(stage, served, site) if plan is None else _does_not_fit(stage, plan, served, site)


def server_size(stage: Stage, serving: ServingPlan | None) -> tuple[int, int]:
    """Return the nodes of a stage's server and the GPUs of each.

    serving: None before fetch has read the model's size; the size is then what `serve` names, else one GPU
    """
    if serving:
        return serving.layout.nodes, serving.layout.gpus_per_node
    serve = stage.serve or Serve()
    return serve.nodes or 1, serve.gpus_per_node or 1


def _plans(serve: Serve, served: ServedModel, site: Site) -> Iterator[ServingPlan]:
    """Yield a plan for each allocation to try, from the smallest one."""
    context = serve.context or served.config["max_position_embeddings"]
    for layout in _layouts(serve, served, site):
        memory = served.memory(layout)
        yield ServingPlan(layout, memory, context, serve.concurrency, serve.minutes, _gpu_bytes(site))


def _check_context(stage: Stage, serve: Serve, model: HuggingFaceConfig) -> None:
    longest = model["max_position_embeddings"]
    if serve.context and serve.context > longest:
        raise UserError(
            f"stages.{stage.name}.serve.context {serve.context} is longer than the model's max_position_embeddings {longest}",
            f"set serve.context to at most {longest}",
        )


def _check_keys_of_engines(stage: Stage, serve: Serve, model: HuggingFaceConfig, site: Site) -> None:
    """Raise UserError for keys that would have no effect."""
    key, engine = f"stages.{stage.name}.serve", site.serving.engine
    if serve.max_running_requests and engine == "transformers":
        raise UserError(
            f"{key}.max_running_requests {serve.max_running_requests}: engine transformers answers one request after the other",
            "remove the key, or set serving.engine in the site file to vllm or sglang",
        )
    if serve.expert_parallel and not spreads_models(site):
        raise UserError(
            f"{key}.expert_parallel is true, but engine {engine} of site {site.name} does not spread a model over GPUs",
            "remove the key, or use a site with GPUs whose serving.engine is vllm or sglang",
        )
    if serve.expert_parallel and not any(sparse_layers(model)):
        raise UserError(f"{key}.expert_parallel is true, but the model has no experts", "remove the key")


def spreads_models(site: Site) -> bool:
    """Return whether the site's engine spreads a model over GPUs. `transformers serve` and engines on CPUs do not."""
    return site.serving.engine != "transformers" and site.node.gpus > 0


def _most(site: Site) -> tuple[int, int]:
    """Return the most nodes, and the most GPUs of each, that a server of the site can use."""
    partition = site.partition_for("gpu")
    return (partition.max_nodes, partition.node.gpus) if spreads_models(site) else (1, 1)


def _check_allocation(stage: Stage, serve: Serve, site: Site) -> None:
    partition, (nodes, gpus) = site.partition_for("gpu"), _most(site)
    for key, value, limit in (("nodes", serve.nodes, nodes), ("gpus_per_node", serve.gpus_per_node, gpus)):
        if value and value > limit:
            raise UserError(
                f"stages.{stage.name}.serve.{key} {value} exceeds the limit of {partition.title} at site {site.name}, {limit}"
                + ("" if spreads_models(site) else f" (engine {site.serving.engine}: one GPU, or a node without GPUs)"),
                f"set serve.{key} to at most {limit}",
            )
    if site.scheduler == "slurm" and serve.minutes > (partition.max_minutes or serve.minutes):
        raise UserError(
            f"stages.{stage.name}.serve.minutes {serve.minutes} exceeds max_minutes {partition.max_minutes} of "
            f"{partition.title} at site {site.name}",
            f"set serve.minutes to at most {partition.max_minutes}: the server starts again in the next allocation",
        )


def _layouts(serve: Serve, served: ServedModel, site: Site) -> Iterator[ServingLayout]:
    """Yield the layouts to try, from the smallest allocation: fewer GPUs of one node, then more nodes with all their GPUs."""
    most_nodes, most_gpus = _most(site)
    all_gpus = serve.gpus_per_node or most_gpus
    whole_node = serve.gpus_per_node or site.partition_for("gpu").exclusive
    one_node = [all_gpus] if whole_node else _part_of_a_node(all_gpus)
    node_counts = [serve.nodes] if serve.nodes else range(1, most_nodes + 1)
    for nodes in node_counts:
        for gpus in one_node if nodes == 1 else [all_gpus]:
            if layout := _layout(served, nodes, gpus, serve.expert_parallel):
                yield layout


def _part_of_a_node(gpus: int) -> list[int]:
    return [*(2**power for power in range(gpus.bit_length()) if 2**power < gpus), gpus]


def _layout(served: ServedModel, nodes: int, gpus: int, expert_parallel: bool) -> ServingLayout | None:
    """Return the layout with the most tensor-parallel ranks inside a node; None if there are more pipeline ranks than layers."""
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    if expert_parallel:
        # SGLang refuses a remainder; in vLLM the first ranks would hold more experts than the memory plan counts.
        sizes = [size for size in sizes if expert_counts(served.config)[0] % size == 0]
    tensor = max(size for size in sizes if can_split(served.config, served.dtype, size))
    pipeline = nodes * gpus // tensor
    return ServingLayout(nodes, gpus, tensor, pipeline) if pipeline <= served.config["num_hidden_layers"] else None


def can_split(c: HuggingFaceConfig, dtype: ExportDtype, tensor: int) -> bool:
    """Return whether this number of tensor-parallel ranks can share the model.

    Each rank gets whole heads. Of FP8 matrices it gets whole blocks, as their factors cannot be divided. SGLang, and
    vLLM for Qwen3-MoE, refuse more ranks than experts, although each rank would get a part of every expert.
    """
    heads, shared = c["num_attention_heads"], key_value_heads(c)
    if any(sparse_layers(c)) and tensor > expert_counts(c)[0]:
        return False
    if heads % tensor or (shared % tensor and tensor % shared):
        return False
    widths = [width for _, width in mlp_widths(c)]
    if any(width % tensor for width in widths):
        return False
    on_a_rank = [*(width // tensor for width in widths), *_head_widths(c, heads // tensor, max(1, shared // tensor))]
    return dtype != "fp8" or tensor == 1 or all(width % FP8_BLOCK == 0 for width in on_a_rank)


def _head_widths(c: HuggingFaceConfig, heads: int, shared: int) -> list[int]:
    """Return the widths of the matrices of these numbers of query heads, and of key and value heads."""
    if not has_latent_attention(c):
        return [heads * head_dim(c), shared * head_dim(c)]
    keys = (c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["qk_nope_head_dim"] + c["v_head_dim"], c["v_head_dim"])
    return [heads * width for width in keys]


def _gpu_bytes(site: Site) -> float | None:
    node = site.node
    if not node.gpus:
        return node.memory_mb * 2.0**20
    return None if node.gpu_memory_gib is None else node.gpu_memory_gib * GIB


def _fits(plan: ServingPlan) -> bool:
    return plan.gpu_bytes is None or plan.needed_bytes <= usable_bytes(plan.gpu_bytes)


def _no_layout(stage: Stage, served: ServedModel, site: Site) -> UserError:
    serve, layers = stage.serve or Serve(), served.config["num_hidden_layers"]
    nodes, gpus = serve.nodes or 1, serve.gpus_per_node or _most(site)[1]

    def most_gpus(nodes: int, limit: int) -> int | None:
        return next((n for n in range(limit, 0, -1) if _layout(served, nodes, n, serve.expert_parallel)), None)

    fewer_nodes = next((n for n in range(nodes - 1, 0, -1) if _layout(served, n, gpus, serve.expert_parallel)), None)
    fewer_gpus = most_gpus(nodes, gpus - 1)
    choices = [
        *([f"serve.gpus_per_node to {fewer_gpus}"] if fewer_gpus else []),
        *([f"serve.nodes to {fewer_nodes}"] if fewer_nodes else []),
    ]
    return UserError(
        f"stages.{stage.name}.serve: no layout for this number of GPUs: the model has {layers} layers for pipeline ranks, and "
        f"{served.config['num_attention_heads']} heads, which tensor ranks divide",
        f"set {' or '.join(choices) or f'serve.nodes to 1 and serve.gpus_per_node to {most_gpus(1, gpus)}'}",
    )


def _does_not_fit(stage: Stage, plan: ServingPlan, served: ServedModel, site: Site) -> UserError:
    assert plan.gpu_bytes is not None
    weights, usable = plan.memory.weights / GIB, usable_bytes(plan.gpu_bytes) / GIB
    unit, key = ("GPU", "gpu_memory_gib") if site.node.gpus else ("node", "memory_mb")
    limit = f"{usable:.1f} GiB of a {unit} are for weights and KV cache (80 % of node.{key})"
    more = _more_gpus(stage, served, site)
    fitting = plan.memory.tokens_that_fit(plan.gpu_bytes)
    if fitting < 1:
        in_fp8 = "set export_dtype to fp8" if site.node.gpus and _is_served_in_fp8(stage, served, site) else None
        return UserError(
            f"stages.{stage.name}.serve: on {plan.layout}, the weights are {weights:.1f} GiB on the fullest {unit}; {limit}",
            ", or ".join(filter(None, (more, in_fp8))) or f"use a site with more {unit}s, or more memory in each",
        )
    return UserError(
        f"stages.{stage.name}.serve: on {plan.layout}, a KV cache for concurrency {plan.concurrency} x context {plan.context} "
        f"tokens does not fit in addition to {weights:.1f} GiB of weights: {fitting} tokens fit; {limit}",
        f"reduce serve.context or serve.concurrency so that their product is at most {fitting}"
        + (f", or {more}" if more else ""),
    )


def _more_gpus(stage: Stage, served: ServedModel, site: Site) -> str | None:
    """Return the remedy that names the fewest nodes on which the server fits; None if the site has too few."""
    if not spreads_models(site):
        return _ANOTHER_ENGINE if site.node.gpus else None
    for changes, words in (
        ({"nodes": None}, ""),
        ({"nodes": None, "gpus_per_node": None}, "remove serve.gpus_per_node and "),
    ):
        serve = (stage.serve or Serve()).model_copy(update=changes)
        if fewest := next((plan.layout.nodes for plan in _plans(serve, served, site) if _fits(plan)), None):
            return f"{words}set serve.nodes to {fewest}"
    return None


def _is_served_in_fp8(stage: Stage, served: ServedModel, site: Site) -> bool:
    if stage.export_dtype == "fp8":
        return False
    try:
        plan_serving(stage.model_copy(update={"export_dtype": "fp8"}), served.config, site)
    except UserError:
        return False
    return True
