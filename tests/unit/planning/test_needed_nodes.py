"""The smallest number of nodes: it fits, the next smaller one does not, and the layout is one that the plan accepts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longhaul.config.load_config import load_config, load_site
from longhaul.config.model_size import model_size
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.config.well_known_models import REFERENCE_MODELS
from longhaul.errors import UserError
from longhaul.planning import build_plan, model_config
from longhaul.planning.needed_nodes import USED_SHARE, WAYS, example_stage, node_counts, smallest_fits
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import plan_of

GIB = 2**30
# Parameters in billions, as the models' cards on the hub state them (Qwen 1.5 B without tied embeddings: 1.78).
PARAMETERS = {"1.5B": 1.78, "7B": 7.62, "Llama-8B": 8.03, "14B": 14.77, "32B": 32.76, "70B": 70.55, "R1": 671.03}


@pytest.fixture(scope="module")
def site() -> Site:
    """Nodes with 8 GPUs of 80 GiB and 1,000,000 MiB of CPU memory."""
    return load_site("slurm-generic", Path())


def test_reference_models_have_the_parameters_of_their_model_cards():
    for name, config in REFERENCE_MODELS.items():
        expected = next(value for suffix, value in PARAMETERS.items() if name.endswith(suffix))
        assert round(model_size(config).total / 1e9, 2) == expected, name


def test_weights_alone_set_a_lower_bound(site: Site):
    """ZeRO 3 holds 16 bytes per parameter over all GPUs; ZeRO 1 holds 4 of them on each GPU."""
    fits = smallest_fits(example_stage(4096), REFERENCE_MODELS["DeepSeek-R1-Distill-Llama-70B"], site)
    zero_3 = fits["ZeRO 3"]
    node_bytes = 8 * 80 * GIB * USED_SHARE
    assert fits["ZeRO 1"] is None, "70.55 B x 4 bytes are more than one GPU has"
    assert zero_3 and 70.55e9 * 16 / node_bytes <= zero_3.nodes == 3


@pytest.mark.parametrize("name", ["DeepSeek-R1-Distill-Qwen-32B", "DeepSeek-R1-Distill-Llama-70B"])
def test_fit_is_within_the_limits_and_fewer_nodes_are_not(name: str, site: Site):
    model = REFERENCE_MODELS[name]
    for way, fit in smallest_fits(example_stage(4096), model, site).items():
        if fit is None:
            continue
        assert fit.memory.total <= USED_SHARE * 80 * GIB and fit.host_gib * 1024 <= 1_000_000, way
        counts = node_counts(128)
        fewer = counts[counts.index(fit.nodes) - 1] if fit.nodes > 1 else 0
        if fewer:
            smaller = site.model_copy(
                update={"partitions": tuple(p.model_copy(update={"max_nodes": fewer}) for p in site.partitions)}
            )
            assert smallest_fits(example_stage(4096), model, smaller)[way] is None, way


def test_offload_needs_fewer_nodes_and_cpu_memory(site: Site):
    fits = smallest_fits(example_stage(4096), REFERENCE_MODELS["DeepSeek-R1"], site)
    plain, offloaded = fits["ZeRO 3"], fits["ZeRO 3, CPU optimizer"]
    assert plain and offloaded and offloaded.nodes < plain.nodes and offloaded.host_gib > 10 * plain.host_gib


def test_the_plan_accepts_each_layout(tmp_path: Path, site: Site):
    loaded = load_config(REPOSITORY / "config/examples/deepseek-v3-671b-3d.yaml")
    stage = loaded.config.stages[0]
    model = model_config(loaded, None)
    assert model is not None
    fits = {way: fit for way, fit in smallest_fits(stage, model, loaded.site).items() if fit}
    assert "ZeRO 1, split model" in fits and len(fits) >= 4
    for fit in fits.values():
        stages: tuple[Stage, ...] = (fit.stage,)
        changed = loaded.config.model_copy(update={"stages": stages})
        planned = build_plan(replace(loaded, config=changed)).stages[0]
        assert planned.memory == fit.memory


def test_larger_limit_gives_more_numbers_to_try():
    assert node_counts(1) == [1] and node_counts(10) == [1, 2, 3, 4, 6, 8, 10] and node_counts(64)[-1] == 64


def test_site_without_gpu_memory_is_refused_until_it_is_added(tmp_path: Path):
    plan = plan_of(tmp_path)
    with pytest.raises(UserError, match="states no gpu_memory_gib"):
        smallest_fits(plan.stages[0].stage, REFERENCE_MODELS["DeepSeek-R1"], plan.site)
    added = plan_of(tmp_path, None, {"partitions.0.node.gpus": 8, "partitions.0.node.gpu_memory_gib": 80}).site
    assert smallest_fits(plan.stages[0].stage, REFERENCE_MODELS["DeepSeek-R1"], added)


def test_every_way_is_in_the_result(site: Site):
    assert tuple(smallest_fits(example_stage(4096), REFERENCE_MODELS["DeepSeek-R1"], site)) == WAYS
