"""Reads what a program of nccl-tests or rccl-tests prints: the list of its ranks, and the table of sizes, times and bandwidths.

The format is that of NVIDIA/nccl-tests 2.13 to 2.19 (src/util.cu, src/common.cu) and ROCm/rccl-tests (src/common.cu). Lines that
begin with # are comments; the list of ranks and the names of the columns are among them. A build without MPI prints one list with
rank 0 alone for each process. Releases before 2.13 have a column `error` in place of `#wrong`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from longhaul.artifacts.nccl_tests_report import NcclTestsResult, NcclTestsTiming

_RANK = re.compile(r"^#\s+Rank\s+(\d+)\s", re.MULTILINE)
_ROW = re.compile(r"^\s*\d+\s+\d+\s+[a-z]")  # size, count, type
_COLUMNS = ("time", "algbw", "busbw", "#wrong")
_NEWER = "use nccl-tests 2.13 or newer"


def rank_problem(text: str, ranks: int) -> str:
    """Return why the printed list of ranks is not that of `ranks` ranks, with the remedy; "" if it is, or is not there yet."""
    found = [int(number) for number in _RANK.findall(text)]
    if not found or sorted(found) == list(range(ranks)):
        return ""
    if set(found) == {0}:
        return (
            f"{len(found)} of {ranks} processes measured alone, each as rank 0: build nccl-tests with MPI=1, and start it as its "
            "MPI expects: srun_extra: [--mpi=pmix] in the site file, or another kind of srun --mpi=list"
        )
    return (
        f"it measured between {len(set(found))} ranks, not {ranks}: check node.gpus of the partition in the site file"
    )


def read_table(text: str, collective: str, ranks: int) -> list[NcclTestsResult]:
    """Return the rows, without a last line that is not complete.

    Raises:
        ValueError: the columns are others, or a row has no numbers; the message has the remedy.
    """
    lines = text.split("\n")[:-1]
    names = next((line.lstrip("# ").split() for line in lines if line.startswith("#") and "busbw" in line.split()), [])
    rows = [line for line in lines if _ROW.match(line)]
    if not rows:
        return []
    if not names or not _RANK.search(text):
        raise ValueError(f"it printed no {'list of ranks' if names else 'names of columns'} before its table; {_NEWER}")
    if missing := [name for name in _COLUMNS if name not in names]:
        raise ValueError(f"the table has no column {missing[0]}; {_NEWER}")
    # Columns at the left may be empty, such as redop of all_gather. Those from `time` on are always there.
    measured = names[names.index("time") :]
    is_twice = measured.count("busbw") == 2
    halves = (measured[: len(measured) // 2], measured[len(measured) // 2 :]) if is_twice else (measured, [])
    # A message of 8 bytes has no element for each rank: all_gather and others then print a row of 0 bytes.
    return [found for line in rows if (found := _row(line, halves, collective, ranks))["bytes"]]


def _row(line: str, halves: tuple[Sequence[str], Sequence[str]], collective: str, ranks: int) -> NcclTestsResult:
    words = line.split()
    width = len(halves[0]) + len(halves[1])
    try:
        if len(words) < 3 + width:
            raise ValueError
        first, second = words[-width:][: len(halves[0])], words[-width:][len(halves[0]) :]
        return {
            "collective": collective,
            "bytes": int(words[0]),
            "world_size": ranks,
            "out_of_place": _timing(halves[0], first),
            "in_place": _timing(halves[1], second) if halves[1] else None,
        }
    except ValueError:
        raise ValueError(
            f"no numbers in the row {line.strip()[:120]!r}; if text of NCCL is in it, remove NCCL_DEBUG from `environment` of "
            "the site file"
        ) from None


def _timing(names: Sequence[str], words: Sequence[str]) -> NcclTestsTiming:
    values = dict(zip(names, words, strict=True))
    wrong = values["#wrong"]
    return {
        "time_us": _number(values["time"]),
        "algorithm_bandwidth_gbps": _number(values["algbw"]),
        "bus_bandwidth_gbps": _number(values["busbw"]),
        "wrong": None if wrong == "N/A" else _number(wrong),
    }


def _number(word: str) -> float:
    value = float(word)
    if not math.isfinite(value) or value < 0:
        raise ValueError
    return value
