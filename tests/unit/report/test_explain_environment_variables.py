"""`longhaul fabric explain` shows what a training's ranks get, from where, and what was set before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.report.explain_environment_variables import (
    ExplainedVariable,
    explained_variables,
    print_explained_variables,
)
from longhaul.runtime.rdma_variables import RdmaPort
from tests.support.small_configs import LOCAL, plan_of

HALF_A_NODE = {"stages.0.gpus_per_node": 4, "stages.0.global_batch_size": 16}
INFINIBAND = {"interconnect.kind": "infiniband"}
MIXED = [RdmaPort("mlx5_0", 1, "InfiniBand"), RdmaPort("mlx5_1", 1, "Ethernet", 3)]


def rows(
    folder: Path, site: dict[str, Any], environ: dict[str, str], ports: list[RdmaPort]
) -> dict[str, ExplainedVariable]:
    found = explained_variables(plan_of(folder, HALF_A_NODE, site), "base", environ, ports)
    assert len({row.name for row in found}) == len(found)
    return {row.name: row for row in found}


def test_derived_values_come_with_source_and_reason(tmp_path: Path):
    found = rows(tmp_path, INFINIBAND, {}, MIXED)
    assert found["NCCL_NVLS_ENABLE"][1:3] == ("0", "plan") and "4 of 8 GPUs" in found["NCCL_NVLS_ENABLE"].reason
    off = rows(tmp_path, {"interconnect.nvlink_multicast": "off"}, {"NCCL_NVLS_ENABLE": "1"}, [])
    assert off["NCCL_NVLS_ENABLE"][1:3] == ("0", "site file, interconnect.nvlink_multicast")
    assert found["NCCL_IB_HCA"][1:3] == ("=mlx5_0:1", "this host's ports")
    assert found["TORCH_FR_DUMP_TEMP_FILE"].value.startswith("results/small/logs/train/base/attempt-")
    assert found["NCCL_ALGO, NCCL_PROTO"][1:3] == ("", "NCCL")


def test_login_node_without_ports_shows_that_nodes_decide(tmp_path: Path):
    assert rows(tmp_path, INFINIBAND, {}, [])["NCCL_IB_HCA"][1:3] == ("", "ports of the node")
    assert "NCCL_IB_HCA" not in rows(tmp_path, {}, {}, [])


def test_what_the_shell_has_set_is_shown_and_judged(tmp_path: Path):
    environ = {"NCCL_NVLS_ENABLE": "1", "NCCL_BLOCKING_WAIT": "1", "FI_PROVIDER": "cxi", "HOME": "/home/me"}
    found = rows(tmp_path, {**INFINIBAND, "environment": {"NCCL_IB_DISABLE": "1"}}, environ, [])
    assert found["NCCL_NVLS_ENABLE"][1:3] == ("1", "this shell") and "would set 0" in found["NCCL_NVLS_ENABLE"].reason
    assert "deprecated" in found["NCCL_BLOCKING_WAIT"].reason and found["FI_PROVIDER"].value == "cxi"
    assert "remove it" in found["NCCL_IB_DISABLE"].reason and "HOME" not in found


def test_stages_with_the_same_variables_share_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cpus = {**LOCAL, "accelerator": "cpu", "partitions.0.node.gpus": 0}
    print_explained_variables(plan_of(tmp_path, {"stages.0.gpus_per_node": 1}, cpus), {}, [])
    shown = capsys.readouterr().out
    assert "Environment of the training of base, chat" in shown and "NCCL" not in shown
