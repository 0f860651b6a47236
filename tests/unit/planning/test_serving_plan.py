"""Layout of a server: the smallest that fits, divisors of heads and FP8 blocks, and refusals with value, limit and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.config.load_config import load_site
from longhaul.config.serve_config import Serve
from longhaul.config.site_config import Site
from longhaul.config.site_serving_config import EngineName, Serving
from longhaul.config.stage_config import Stage
from longhaul.config.well_known_models import REFERENCE_MODELS
from longhaul.errors import UserError
from longhaul.planning.serving_plan import ServingPlan, can_split, plan_serving
from tests.support.small_configs import DEEPSEEK, LLAMA, plan_of

R1, QWEN = REFERENCE_MODELS["DeepSeek-R1"], REFERENCE_MODELS["DeepSeek-R1-Distill-Qwen-7B"]


@pytest.fixture(scope="module")
def site() -> Site:
    """Nodes with 8 GPUs of 80 GiB, at most 128 of them; the engine is vLLM."""
    return load_site("slurm-generic", Path()).model_copy(update={"serving": Serving(engine="vllm")})


def _with_partition(site: Site, **changes: Any) -> Site:
    first = site.partitions[0].model_copy(update=changes)
    return site.model_copy(update={"partitions": (first, *site.partitions[1:])})


def _plan(site: Site, model: dict[str, Any], dtype: str = "bf16", **serve: Any) -> ServingPlan:
    stage = Stage.model_validate(
        {
            "name": "chat",
            "kind": "sft",
            "dataset": "chats",
            "steps": 1,
            "global_batch_size": 1,
            "sequence_length": 4096,
            "export": "last",
            "export_dtype": dtype,
            "serve": serve,
        }
    )
    return plan_serving(stage, model, site)


def test_deepseek_r1_in_fp8_fits_on_two_nodes_and_not_on_one(site: Site):
    plan = _plan(site, R1, "fp8")
    assert (plan.layout.nodes, plan.layout.tensor, plan.layout.pipeline) == (2, 8, 2)
    assert plan.memory.weights < 0.8 * 80 * 2**30 - plan.memory.token * 163840
    with pytest.raises(UserError, match=r"weights are 79\.3 GiB on the fullest GPU; 64\.0 GiB of a GPU") as error:
        _plan(site, R1, "fp8", nodes=1)
    assert error.value.hint == "set serve.nodes to 2"


def test_deepseek_r1_in_bf16_fits_on_four_nodes_and_not_on_two(site: Site):
    assert _plan(site, R1, nodes=4).layout.pipeline == 4
    with pytest.raises(UserError, match=r"weights are 84\.1 GiB") as error:
        _plan(site, R1, nodes=2)
    assert error.value.hint == "set serve.nodes to 3, or set export_dtype to fp8"


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("DeepSeek-R1-Distill-Llama-8B", 1), ("DeepSeek-R1-Distill-Qwen-32B", 2), ("DeepSeek-R1-Distill-Llama-70B", 4)],
)
def test_the_fewest_gpus_of_a_node_are_taken(site: Site, name: str, gpus: int):
    plan = _plan(site, REFERENCE_MODELS[name], context=32768)
    assert (plan.layout.nodes, plan.layout.gpus_per_node) == (1, gpus)


def test_an_exclusive_node_is_used_whole(site: Site):
    assert _plan(_with_partition(site, exclusive=True), QWEN, context=4096).layout.gpus_per_node == 8


def test_heads_that_gpus_do_not_divide_leave_the_rest_to_pipeline_ranks(site: Site):
    """28 heads: 4 tensor ranks, not 8."""
    plan = _plan(site, QWEN, gpus_per_node=8, context=4096)
    assert (plan.layout.tensor, plan.layout.pipeline) == (4, 2)


def test_fp8_blocks_are_not_divided():
    assert can_split(R1, "fp8", 16), "2048 / 16 is a block"
    assert can_split(R1, "bf16", 32) and not can_split(R1, "fp8", 32)
    assert not can_split(QWEN, "bf16", 8)


def test_there_are_no_more_ranks_than_experts(site: Site):
    """Source: DeepseekV2MoE of SGLang 0.5.23, and Qwen3MoeSparseMoeBlock of SGLang and of vLLM 0.32."""
    layout = _plan(site, R1 | {"n_routed_experts": 4}, gpus_per_node=8, nodes=1).layout
    assert (layout.tensor, layout.pipeline) == (4, 2)


def test_the_width_of_dense_layers_does_not_matter_without_them(site: Site):
    sparse = R1 | {"first_k_dense_replace": 0, "intermediate_size": 18435}
    assert _plan(site, sparse, "fp8").layout.tensor == 8


def test_a_kv_cache_that_does_not_fit_is_refused_with_the_number_of_tokens(site: Site):
    fitting = _plan(site, R1, "fp8", nodes=2).kv_cache_tokens
    assert fitting == int((0.8 * 80 * 2**30 - _plan(site, R1, "fp8", nodes=2).memory.weights) // (31 * 1152))
    with pytest.raises(
        UserError, match=f"concurrency 10 x context 163840 tokens does not fit .*: {fitting} tokens fit"
    ) as error:
        _plan(site, R1, "fp8", nodes=2, concurrency=10)
    assert f"at most {fitting}, or set serve.nodes to 4" in error.value.hint


def test_a_context_longer_than_the_model_is_refused(site: Site):
    with pytest.raises(UserError, match=r"serve.context 200000 is longer than .*max_position_embeddings 163840"):
        _plan(site, R1, context=200000)


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        ({"nodes": 129}, r"serve.nodes 129 exceeds the limit of partition gpu at site slurm-generic, 128"),
        ({"gpus_per_node": 9}, r"serve.gpus_per_node 9 exceeds .*, 8"),
        ({"minutes": 1441}, r"serve.minutes 1441 exceeds max_minutes 1440"),
    ],
)
def test_more_than_the_partition_gives_is_refused(site: Site, serve: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        _plan(site, QWEN, **serve)


def test_a_site_that_is_too_small_says_so(site: Site):
    with pytest.raises(UserError, match="weights are") as error:
        _plan(_with_partition(site, max_nodes=1), R1)
    assert error.value.hint == "use a site with more GPUs, or more memory in each"


def test_too_many_pipeline_ranks_are_refused(site: Site):
    with pytest.raises(UserError, match="28 layers for pipeline ranks, and 28 heads"):
        _plan(site, QWEN, nodes=64)


def test_without_gpu_memory_in_the_site_file_nothing_is_checked(site: Site):
    unknown = _with_partition(site, node=site.node.model_copy(update={"gpu_memory_gib": None}))
    plan = _plan(unknown, R1)
    assert plan.kv_cache_tokens is None and str(plan.layout) == "1 node x 1 GPU (tensor 1 x pipeline 1)"


def test_without_gpus_a_server_is_one_process_with_the_memory_of_the_node():
    site, small = load_site("local", Path()), {"model_type": "llama", **LLAMA}
    plan = _plan(site, small, "fp32")
    assert plan.kv_cache_tokens == int((0.8 * 4000 * 2**20 - 4 * 125_248) // (2 * 4 * 2 * 2 * 16))
    with pytest.raises(UserError, match=r"gpus_per_node 2 exceeds .*, 1 \(engine transformers: one GPU"):
        _plan(site, small, gpus_per_node=2)


def test_transformers_serve_uses_one_gpu_and_caches_all_heads(site: Site):
    alone = site.model_copy(update={"serving": Serving()})
    small = {"model_type": "deepseek_v3", **DEEPSEEK}
    plan = _plan(alone, small)
    assert (plan.layout.nodes, plan.layout.gpus_per_node) == (1, 1)
    assert plan.memory.token == 2 * 2 * 4 * (24 + 16), "2 layers, 4 heads, keys of 16 + 8 and values of 16 elements"
    with pytest.raises(UserError, match=r"nodes 2 exceeds .*, 1 "):
        _plan(alone, small, nodes=2)
    with pytest.raises(UserError, match="weights are") as error:
        _plan(alone, R1)
    assert "serving.engine in the site file to vllm or sglang" in error.value.hint


def test_the_plan_of_a_run_has_its_servers(tmp_path: Path):
    plan = plan_of(tmp_path, {"stages.0.export": "last", "stages.0.serve": {"context": 100}})
    serving = plan.stage("base").serving
    assert serving and serving.context == 100 and plan.stage("chat").serving is None
    with pytest.raises(UserError, match="serve needs an exported model"):
        plan_of(tmp_path, {"stages.0.serve": {}})


def test_defaults_are_used_without_the_section(site: Site):
    stage = Stage.model_validate(
        {"name": "a", "kind": "sft", "dataset": "b", "steps": 1, "global_batch_size": 1, "sequence_length": 64}
    )
    plan = plan_serving(stage, QWEN, site)
    assert (plan.concurrency, plan.minutes, plan.context) == (1, Serve().minutes, 131072)


def test_ranks_that_hold_whole_experts_divide_their_number(site: Site):
    """6 experts: 2 tensor ranks with experts of their own, not 4, although 4 ranks can share each expert."""
    model = {"model_type": "deepseek_v3", **DEEPSEEK, "n_routed_experts": 6}
    layouts = [_plan(site, model, gpus_per_node=4, expert_parallel=expert).layout for expert in (False, True)]
    assert [(layout.tensor, layout.pipeline) for layout in layouts] == [(4, 1), (2, 2)]


@pytest.mark.parametrize(
    ("engine", "model", "serve", "message"),
    [
        (
            "transformers",
            DEEPSEEK,
            {"max_running_requests": 8},
            "max_running_requests 8: engine transformers answers one",
        ),
        (
            "transformers",
            DEEPSEEK,
            {"expert_parallel": True},
            "engine transformers of site slurm-generic does not spread",
        ),
        ("vllm", LLAMA, {"expert_parallel": True}, "expert_parallel is true, but the model has no experts"),
    ],
)
def test_keys_without_effect_are_refused(
    site: Site, engine: EngineName, model: dict[str, Any], serve: dict[str, Any], message: str
):
    family = "deepseek_v3" if model is DEEPSEEK else "llama"
    own = site.model_copy(update={"serving": Serving(engine=engine)})
    with pytest.raises(UserError, match=message):
        _plan(own, {"model_type": family, **model}, **serve)


def test_a_kv_cache_for_more_requests_than_run_is_refused():
    with pytest.raises(ValueError, match="max_running_requests 4 is less than concurrency 8"):
        Serve(concurrency=8, max_running_requests=4)
    assert Serve(concurrency=8, max_running_requests=8).max_running_requests == 8
