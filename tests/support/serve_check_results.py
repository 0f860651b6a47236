"""Results of the check of a served export, as serve_check writes them; tests replace the fields that they are about."""

from __future__ import annotations

from longhaul.artifacts.serve_check_result import Agreement, LoadStep, ServeCheckResult

SAME_TEXT = Agreement(
    compared=6,
    mean_difference=None,
    largest_difference=None,
    mean_bound=None,
    largest_bound=None,
    same_text=0.875,
    least_same_text=0.75,
)
"""The answers of an engine that returns no log probabilities."""
SCORES = Agreement(
    compared=62,
    mean_difference=0.0002,
    largest_difference=0.0031,
    mean_bound=0.001,
    largest_bound=0.005,
    same_text=None,
    least_same_text=None,
)
STEP = LoadStep(
    streams=8,
    tokens=256,
    tokens_per_s=123.456,
    first_token_median_s=0.25,
    first_token_p99_s=0.5,
    inter_token_median_s=0.0123,
    inter_token_p99_s=None,
    largest_difference=0.0021,
)
SERVED = ServeCheckResult(
    stage="chat",
    engine="vllm",
    engine_version="0.32.0",
    path="p",
    weights="w",
    tensor=2,
    pipeline=1,
    context_tokens=512,
    answer_tokens=32,
    start_s=75.0,
    refuses_other_keys=True,
    listens_at=["127.0.0.1:8000"],
    agreement=SCORES,
    load=[STEP],
    distinct_answers=8,
    host_memory_bytes=3 * 2**30,
    gpu_memory_bytes=None,
    shared_pages_count_once=True,
)
