"""Classifies copies between GPUs of a node: a pair is compared with pairs of the same path, and with its place on other nodes.

Two dies of one MI250X are faster than dies of two cards, and NVLink is faster than PCIe, so paths are never compared with each
other. A word such as SYS may stand for unequal paths, so where three nodes have the pair, it is bad only if it is slower than
their usual pair at this place, too.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.checks.build_check_rows import Component
from longhaul.checks.compare_rates_with_limits import (
    FEWEST_FOR_MEDIAN,
    Limit,
    RateCheck,
    RateLimits,
    baseline_limits,
    median_limits,
    rate_row,
)
from longhaul.checks.find_slow_nodes import nodes_of_most_slow_pairs
from longhaul.checks.measurement_types import GpuPair, NodeMeasurements
from longhaul.config.gpu_datasheets import NVLINK_GB_PER_S, datasheet, least_nvlinks_of_pair, min_copy_over_nvlinks

EXACT_COPIES, _RATE = "bytes copied between GPUs", "copies between GPUs"
_MIN_SHARE, _FAILED_SHARE = 0.8, 0.5
"""Shares of the usual rate. A slow pair over PCIe never fails: the path leads through CPUs, and other processes use it, too."""
_DIRECT_LINKS = ("NVLink", "XGMI")
_WRONG = "never train on it: exclude the node, and let the admins check the link between these GPUs, and both GPUs"
_TOOLS = "(nvidia-smi nvlink -s, amd-smi xgmi), the PCIe links, and ACS and IOMMU of the PCIe bridges"
_SLOW = f"exclude the node; let the admins check the links between these GPUs {_TOOLS}"
_SLOW_GPU = f"exclude the node; let the admins check the links of this GPU {_TOOLS}"
_UNUSED_NVLINKS = (
    "let the admins check peer access (nvidia-smi topo -p2p r) and Fabric Manager (systemctl status nvidia-fabricmanager); if "
    "the GPUs of this site have no NVLinks, set node_minimums.nvlinks of the site file to 0"
)

Measured = Mapping[str, NodeMeasurements]
"""Node -> what it measured."""


def wrong_copy_rows(measured: Measured) -> Iterator[CheckRow]:
    """Yield a row per pair that got other bytes than were sent, and a row per node without such pairs."""
    for node, found in measured.items():
        wrong = [pair for pair in found.gpu_pairs if pair.wrong_bytes]
        for pair in wrong:
            value = f"{pair.wrong_bytes} wrong bytes"
            yield _component(node, found, pair).row(EXACT_COPIES, value, "0 wrong bytes", "fail", _WRONG)
        if found.gpu_pairs and not wrong:
            value = f"0 wrong bytes between {len(found.gpu_pairs)} pairs"
            yield Component(node).row(EXACT_COPIES, value, "0 wrong bytes")


def copy_rate_rows(measured: Measured, limits: RateLimits) -> Iterator[CheckRow]:
    """Yield a row per GPU most of whose pairs are slow, per other slow pair, and for the good pairs of each node and path.

    A node all of whose pairs are slow has one row.
    """
    medians = _medians(measured)
    for node, found in measured.items():
        rows = {
            (pair.first, pair.second): rate_row(
                _check(pair.path),
                _component(node, found, pair),
                pair.gb_per_s,
                _limits(pair, medians, limits, gpus=len(found.devices)),
            )
            for pair in found.gpu_pairs
        }
        yield from _slow_rows(node, found, rows)
        yield from _good_rows(node, found, rows)
        count = len(found.devices) * (len(found.devices) - 1) // 2
        if 0 < len(found.gpu_pairs) < count:
            reason = f"{len(found.gpu_pairs)} of {count} pairs were measured in the time for them"
            yield Component(node).unknown(_RATE, reason, "all pairs")


Rows = Mapping[tuple[int, int], CheckRow]
"""Numbers of two GPUs -> the row of their pair."""


def _slow_rows(node: str, found: NodeMeasurements, rows: Rows) -> Iterator[CheckRow]:
    """Yield the rows of what is slow. A GPU with bad links makes its pairs slow, which blames their other GPUs, too."""
    slow = {pair: row for pair, row in rows.items() if row["result"] != "ok"}
    rates = {(pair.first, pair.second): pair.gb_per_s for pair in found.gpu_pairs}
    if 1 < len(slow) == len(rows):
        yield _row_of_several(Component(node), slow, rates, pairs=len(rows))
        return
    pairs_of = {gpu: [pair for pair in rows if gpu in pair] for pair in rows for gpu in pair}
    bad_gpus = nodes_of_most_slow_pairs(pairs_of, slow)
    if 2 * len(bad_gpus) >= len(pairs_of):  # the fault is none of a GPU; with two GPUs, nobody knows which one it is of
        bad_gpus = set()
    for gpu in sorted(bad_gpus):
        own = {pair: slow[pair] for pair in pairs_of[gpu] if pair in slow}
        component = Component(node, found.devices[gpu].name)
        yield {**_row_of_several(component, own, rates, pairs=len(pairs_of[gpu])), "remedy": _SLOW_GPU}
    yield from (row for pair, row in slow.items() if bad_gpus.isdisjoint(pair))


def _row_of_several(component: Component, slow: Rows, rates: Mapping[tuple[int, int], float], pairs: int) -> CheckRow:
    """Return one row for slow pairs, with result, limit and remedy of the worst one. pairs: how many there are, good ones too"""
    worst = slow[min(slow, key=lambda pair: (slow[pair]["result"] != "fail", rates[pair]))]
    value = f"{len(slow)} of {pairs} pairs are slow: {_range_text(rates[pair] for pair in slow)}"
    return component.row(_RATE, value, worst["expected"], worst["result"], worst["remedy"])


def _good_rows(node: str, found: NodeMeasurements, rows: Rows) -> Iterator[CheckRow]:
    good = [pair for pair in found.gpu_pairs if rows[pair.first, pair.second]["result"] == "ok"]
    for path in dict.fromkeys(pair.path for pair in good):
        pairs = [pair for pair in good if pair.path == path]
        slowest = min(pairs, key=lambda pair: pair.gb_per_s)
        value = f"{_range_text(pair.gb_per_s for pair in pairs)} between {len(pairs)} pairs"
        yield Component(node).row(_check(path).check, value, rows[slowest.first, slowest.second]["expected"])


def _check(path: str) -> RateCheck:
    failed_share = _FAILED_SHARE if path.startswith(_DIRECT_LINKS) else 0.0
    check = f"{_RATE}, {path}" if path else _RATE
    return RateCheck(check, "gb_per_s", "", "GB/s", _SLOW, _MIN_SHARE, failed_share)


def _limits(pair: GpuPair, medians: Mapping[object, float], limits: RateLimits, gpus: int) -> list[Limit]:
    """Return the limits of a pair. gpus: of its node"""
    check = _check(pair.path)
    usual = limits.usable_baseline.gpu_pairs.get(pair.path) if limits.usable_baseline else None
    of_baseline = baseline_limits(check, usual) if usual else []
    known = [medians[group] for group in _groups(pair) if group in medians]
    of_run = median_limits(check, min(known)) if known else []
    return [*of_baseline, *of_run, *_nvlink_limits(limits, gpus)]


def _nvlink_limits(limits: RateLimits, gpus: int) -> list[Limit]:
    """Return the limit by the NVLinks that GPUs of this name have in every server: copies may not use them, on any path."""
    sheet = datasheet(limits.gpu_name) if limits.gpu_name else None
    if sheet is None or sheet.nvlinks is None:
        return []
    of_site = limits.minimums.nvlinks  # 0: the site has them without NVLinks
    links = least_nvlinks_of_pair(sheet.nvlinks if of_site is None else of_site, gpus)
    origin = f"{links} NVLinks have {links * NVLINK_GB_PER_S} GB/s"
    return [Limit(min_copy_over_nvlinks(links), origin, "warn", _UNUSED_NVLINKS)] if links else []


def _medians(measured: Measured) -> dict[object, float]:
    """Return the median rate of each group of pairs that are compared; groups of too few pairs have none."""
    rates: dict[object, list[float]] = defaultdict(list)
    for pair in (pair for found in measured.values() for pair in found.gpu_pairs):
        for group in _groups(pair):
            rates[group].append(pair.gb_per_s)
    return {group: statistics.median(found) for group, found in rates.items() if len(found) >= FEWEST_FOR_MEDIAN}


def _groups(pair: GpuPair) -> list[object]:
    """Return what pairs must have in common to be compared: the path, and the place on their nodes."""
    place = (pair.first, pair.second)
    return [pair.path, place] if pair.path else [place]


def _range_text(rates: Iterable[float]) -> str:
    known = sorted(rates)
    return f"{known[0]:.3g} to {known[-1]:.3g} GB/s"


def rates_by_path(measured: Measured) -> dict[str, Sequence[float]]:
    """Return path -> the rates of all pairs of all nodes; pairs without a known path have none."""
    found: dict[str, list[float]] = defaultdict(list)
    for pair in (pair for one in measured.values() for pair in one.gpu_pairs if pair.path):
        found[pair.path].append(pair.gb_per_s)
    return dict(found)


def _component(node: str, found: NodeMeasurements, pair: GpuPair) -> Component:
    return Component(node, f"{found.devices[pair.first].name} <-> {found.devices[pair.second].name}")
