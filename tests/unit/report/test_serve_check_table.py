"""The report's rows about the check of a served export."""

from __future__ import annotations

from dataclasses import replace

from longhaul.artifacts.serve_check_result import LoadStep
from longhaul.report.serve_check_table import serve_check_rows
from tests.support.serve_check_results import SAME_TEXT, SERVED, STEP


def test_rows_of_an_engine_with_log_probabilities():
    rows = serve_check_rows(SERVED)
    assert rows["facts"] == {
        "engine": "vllm 0.32.0",
        "layout": "1 node, 2 tensor x 1 pipeline ranks",
        "answers": "62 log probabilities differ from the trainer's by 2e-4 nats on average and 0.0031 at most "
        "(limits 0.001, 0.005)",
        "start of the server": "1 min 15 s",
        "API key": "requests without the key are refused",
        "listens at": "127.0.0.1:8000",
        "memory of its processes": "3 GiB",
        "memory of the GPUs": "–",
    }
    assert rows["load"] == [
        {
            "requests at the same time": "8",
            "tokens/s": "123",
            "first token, median": "0.25 s",
            "first token, 99 %": "0.5 s",
            "between tokens, median": "0.0123 s",
            "between tokens, 99 %": "–",
            "largest difference, nats": "0.0021",
        }
    ]


def test_a_result_of_an_older_release_has_no_difference_under_load():
    step = LoadStep(**{key: value for key, value in STEP.items() if key != "largest_difference"})  # type: ignore[typeddict-item]
    rows = serve_check_rows(replace(SERVED, load=[step]))
    assert rows["load"][0]["largest difference, nats"] == "–"  # type: ignore[index]


def test_rows_of_an_engine_without_log_probabilities():
    facts = serve_check_rows(replace(SERVED, agreement=SAME_TEXT, refuses_other_keys=False))["facts"]
    assert isinstance(facts, dict)
    assert facts["answers"] == "87.5 % of the greedy text of 6 samples (limit 75 %)"
    assert facts["API key"] == "none: it listens on this node alone"


def test_rows_of_a_server_on_two_nodes_say_where_the_memory_was_measured():
    facts = serve_check_rows(replace(SERVED, nodes=2, pipeline=2))["facts"]
    assert isinstance(facts, dict)
    assert facts["layout"] == "2 nodes, 2 tensor x 2 pipeline ranks"
    assert facts["memory of its processes on the first node"] == "3 GiB"


def test_memory_that_counts_shared_pages_several_times_says_so():
    facts = serve_check_rows(replace(SERVED, shared_pages_count_once=False))["facts"]
    assert isinstance(facts, dict)
    assert facts["memory of its processes"] == "3 GiB, pages that several share counted for each"
