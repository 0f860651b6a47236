"""bench/results/serve.txt: what `make test-serve` measured. It is written only when every test has given its rows."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from bench.machine import describe_machine, write_result
from longhaul.artifacts.serve_check_result import ServeCheckResult
from tests.serve.make_exports import CASES

LADDER = (1, 2, 4, 8, 16, 32, 64)
STREAMS: dict[str, tuple[int, ...]] = {"llama": (1, 8, 64), "qwen3": (4,), "deepseek-v3-tied": (1, 64)}
"""Tiny model -> numbers of requests at the same time that vLLM answers. The demo's export gets all of LADDER."""
VICTIMS = ("check", "guardian", "server", "worker")
TWO_HOSTS = "vllm on two hosts"
NOT_EXPORTED, ROTARY_KERNEL = "deepseek-v3 of transformers", "vllm with its rotary kernel, which is wrong"
TRANSFORMERS_SERVE = "transformers serve"

_SCORES = "largest difference of log probabilities from those of transformers 5, in nats; 50 prompts of 24 tokens"
_SERVED = "largest difference of a server's log probabilities from the trainer's, in nats; 62 tokens"
_LOAD = "streamed answers, compared with the answers to the same prompts alone; a lost or another answer fails the test"
_ENDS = "ends of a server of the demo's export in vLLM"
ROWS: dict[str, list[str]] = {
    _SCORES: [
        "demo transformers 4",
        *(f"{name} {engine}" for name in CASES for engine in ("transformers 4", "vllm")),
        f"llama {TWO_HOSTS}",
        *(f"{NOT_EXPORTED} {engine}" for engine in ("vllm", ROTARY_KERNEL)),
    ],
    _SERVED: [*(f"{name} vllm" for name in ("demo", *STREAMS)), f"llama {TWO_HOSTS}", f"demo {TRANSFORMERS_SERVE}"],
    _LOAD: [
        *(f"demo {engine}, {count} streams" for engine in ("vllm", TRANSFORMERS_SERVE) for count in LADDER),
        *(f"{name} vllm, {count} streams" for name, counts in STREAMS.items() for count in counts),
    ],
    _ENDS: [
        "serve_check ends",
        *(f"serve_check, kill -9 of the {victim}" for victim in VICTIMS),
        "longhaul serve --stop",
        "longhaul serve, kill -9 of a client",
        "longhaul serve, kill -9 of the supervisor",
    ],
}
"""Table -> beginnings of its rows, in their order."""


class ServeRecord:
    """Rows of the record. A test adds its rows after its last assertion, so a failed one leaves them out."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], str] = {}

    def add_scores(self, name: str, engine: str, largest: float, bound: float) -> None:
        self._add(_SCORES, f"{name} {engine}", _difference(largest, bound))

    def add_check(self, name: str, engine: str, result: ServeCheckResult, bound: float) -> None:
        """Add what a check found. bound: the test's, for log probabilities"""
        found, largest = result.agreement, result.agreement["largest_difference"]
        same_text = f"{found['same_text'] or 0:.0%} of the greedy text, at least {found['least_same_text'] or 0:.0%}"
        self._add(_SERVED, f"{name} {engine}", same_text if largest is None else _difference(largest, bound))

    def add_load(self, name: str, engine: str, result: ServeCheckResult, bound: float) -> None:
        """Add the loads of a check. It raises an error at a lost answer and at another answer."""
        for step in result.load:
            largest = step.get("largest_difference")
            same = "equal text" if largest is None else f"largest difference {_difference(largest, bound)}"
            self._add(_LOAD, f"{name} {engine}, {step['streams']} streams", f"{step['tokens']:>4} tokens, {same}")

    def add_end(self, event: str, outcome: str) -> None:
        self._add(_ENDS, event, outcome)

    def _add(self, table: str, row: str, text: str) -> None:
        assert row in ROWS[table], row
        self._rows[table, row] = text

    def missing(self) -> list[str]:
        return [row for table, rows in ROWS.items() for row in rows if (table, row) not in self._rows]

    def write(self, pythons: Mapping[str, tuple[str, Sequence[str]]]) -> None:
        """Write the record if no row is missing. pythons: environment -> its Python, and packages to name with their versions"""
        if missing := self.missing():
            print(f"bench/results/serve.txt is not written: no rows {', '.join(missing)}")
            return
        lines = ["command: make test-serve", *describe_machine(("torch", "transformers"))[1:]]
        lines += [f"versions for {name}: {_versions(*python)}" for name, python in pythons.items()]
        for table, rows in ROWS.items():
            width = max(map(len, rows))
            lines += ["", table, *(f"{row:<{width}}  {self._rows[table, row]}" for row in rows)]
        write_result("serve", lines)


def _difference(largest: float, bound: float) -> str:
    return f"{largest:.1e}, bound {bound:.0e}"


def _versions(python: str, packages: Sequence[str]) -> str:
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    printed = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    return ", ".join(f"{package} {found}" for package, found in zip(packages, printed.split(), strict=True))
