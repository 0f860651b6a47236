"""Tables of needed nodes: the page shows what the command prints, and a plan has one table per stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.cli import main
from longhaul.report.needed_nodes_table import stage_nodes_tables
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import plan_of

PAGE = REPOSITORY / "docs/how-to/choose-the-number-of-nodes.md"


def printed_by(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]):
    printed = printed_by(capsys, "site", "nodes", "slurm-generic")
    assert printed.count("\n") == 9 and printed in PAGE.read_text(encoding="utf-8")


def test_longer_sequences_need_more_nodes(capsys: pytest.CaptureFixture[str]):
    short, long = (
        printed_by(capsys, "site", "nodes", "slurm-generic", "--sequence-length", tokens)
        for tokens in ("4096", "131072")
    )
    assert short != long and "DeepSeek-R1 | 671.0 B" in long


def test_plan_has_a_table_per_stage(tmp_path: Path):
    plan = plan_of(tmp_path, None, {"partitions.0.node.gpu_memory_gib": 80})
    tables = stage_nodes_tables(plan)
    assert [table.row_count for table in tables] == [5, 5]
    assert "stage base" in str(tables[0].title) and "stage chat" in str(tables[1].title)


def test_plan_without_the_memory_of_a_gpu_has_none(tmp_path: Path):
    assert stage_nodes_tables(plan_of(tmp_path)) == []


def test_model_that_does_not_fit_is_shown_with_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes = {
        "model.llama.hidden_size": 8192,
        "model.llama.intermediate_size": 28672,
        "model.llama.num_hidden_layers": 80,
    }
    changes |= {"model.llama.num_attention_heads": 64, "model.llama.num_key_value_heads": 8}
    site = {"partitions.0.node.gpu_memory_gib": 80, "partitions.0.max_nodes": 1}
    changes |= {"stages.0.zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}}
    changes |= {"stages.1.zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}}
    cells = stage_nodes_tables(plan_of(tmp_path, changes, site))[0].columns[1].cells
    assert next(iter(cells)) == "> 1"
