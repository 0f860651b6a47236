"""Rows of the report about the checks of served exports."""

from __future__ import annotations

from longhaul.artifacts.serve_check_result import Agreement, LoadStep, ServeCheckResult
from longhaul.report import number_format as text


def serve_check_rows(result: ServeCheckResult) -> dict[str, object]:
    """Return {"stage", "facts": {title: text}, "load": [{title: text}]} of one check."""
    keys = (
        "requests without the key are refused" if result.refuses_other_keys else "none: it listens on this node alone"
    )
    on_first = " on the first node" if result.nodes > 1 else ""
    shared = "" if result.shared_pages_count_once else ", pages that several share counted for each"
    return {
        "stage": result.stage,
        "facts": {
            "engine": f"{result.engine} {result.engine_version}",
            "layout": f"{result.nodes} node{'s' if result.nodes > 1 else ''}, {result.tensor} tensor x {result.pipeline} "
            "pipeline ranks",
            "answers": _agreement(result.agreement),
            "start of the server": text.duration(result.start_s),
            "API key": keys,
            "listens at": ", ".join(result.listens_at),
            f"memory of its processes{on_first}": text.size(result.host_memory_bytes) + shared,
            f"memory of the GPUs{on_first}": text.size(result.gpu_memory_bytes),
        },
        "load": [_load(step) for step in result.load],
    }


def _agreement(agreement: Agreement) -> str:
    if agreement["same_text"] is not None:
        return (
            f"{text.percent(agreement['same_text'])} of the greedy text of {agreement['compared']} samples "
            f"(limit {text.percent(agreement['least_same_text'])})"
        )
    mean, largest = (text.significant(agreement[key]) for key in ("mean_difference", "largest_difference"))
    limits = (text.significant(agreement[key]) for key in ("mean_bound", "largest_bound"))
    return (
        f"{agreement['compared']} log probabilities differ from the trainer's by {mean} nats on average and {largest} at most "
        f"(limits {', '.join(limits)})"
    )


def _load(step: LoadStep) -> dict[str, str]:
    return {
        "requests at the same time": text.exact(step["streams"]),
        "tokens/s": text.significant(step["tokens_per_s"]),
        "first token, median": _seconds(step["first_token_median_s"]),
        "first token, 99 %": _seconds(step["first_token_p99_s"]),
        "between tokens, median": _seconds(step["inter_token_median_s"]),
        "between tokens, 99 %": _seconds(step["inter_token_p99_s"]),
        "largest difference, nats": text.significant(step.get("largest_difference")),
    }


def _seconds(value: float | None) -> str:
    return text.MISSING if value is None else f"{text.significant(value)} s"
