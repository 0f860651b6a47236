"""Classifies copies between GPUs of a node: a pair is compared with pairs of the same path, and with its place on other nodes.

Two dies of one MI250X are faster than dies of two cards, and NVLink is faster than PCIe, so paths are never compared with each
other. A word such as SYS may stand for unequal paths, so where three nodes have the pair, it is bad only if it is slower than
their usual pair at this place, too.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.checks.build_check_rows import Component
from longhaul.checks.measurement_types import GpuPair, NodeMeasurements

EXACT_COPIES, _RATE = "bytes copied between GPUs", "copies between GPUs"
SLOW_SHARE, FAILED_SHARE = 0.8, 0.5
"""Shares of the usual rate below which a pair is named, and fails. Over PCIe it never fails: the path leads through CPUs."""
_FEWEST_COMPARED = 3
"""The median of two does not say which one is slow."""
_DIRECT_LINKS = ("NVLink", "XGMI")
_WRONG = "never train on it: exclude the node, and let the admins check the link between these GPUs, and both GPUs"
_SLOW = (
    "exclude the node; let the admins check the links between these GPUs (nvidia-smi nvlink -s, amd-smi xgmi), the PCIe "
    "links, and ACS and IOMMU of the PCIe bridges"
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


def copy_rate_rows(measured: Measured) -> Iterator[CheckRow]:
    """Yield a row per slow pair, and a row for the other pairs of each node and path."""
    usual = _UsualRates(measured)
    for node, found in measured.items():
        for path, pairs in _by_path(found.gpu_pairs).items():
            slow = [pair for pair in pairs if usual.result(pair) != "ok"]
            yield from (_slow_row(_component(node, found, pair), pair, usual) for pair in slow)
            if good := [pair for pair in pairs if pair not in slow]:
                yield Component(node).row(_check(path), _range_text(good), usual.expected(good))
        count = len(found.devices) * (len(found.devices) - 1) // 2
        if 0 < len(found.gpu_pairs) < count:
            reason = f"{len(found.gpu_pairs)} of {count} pairs were measured in the time for them"
            yield Component(node).unknown(_RATE, reason, "all pairs")


def _slow_row(component: Component, pair: GpuPair, usual: _UsualRates) -> CheckRow:
    result = usual.result(pair)
    share = FAILED_SHARE if result == "fail" else SLOW_SHARE
    return component.row(_check(pair.path), f"{pair.gb_per_s:.3g} GB/s", usual.expected([pair], share), result, _SLOW)


class _UsualRates:
    """Median rates by path, and by the place of a pair on all nodes. Groups of too few pairs have none."""

    def __init__(self, measured: Measured) -> None:
        rates: dict[object, list[float]] = defaultdict(list)
        for pair in (pair for found in measured.values() for pair in found.gpu_pairs):
            for group in _groups(pair):
                rates[group].append(pair.gb_per_s)
        self.medians = {
            group: statistics.median(found) for group, found in rates.items() if len(found) >= _FEWEST_COMPARED
        }

    def rate(self, pair: GpuPair) -> float | None:
        """Return the lower median of the pair's groups; None if there is nothing to compare it with."""
        return min((self.medians[group] for group in _groups(pair) if group in self.medians), default=None)

    def result(self, pair: GpuPair) -> Result:
        usual = self.rate(pair)
        if usual is None or pair.gb_per_s >= SLOW_SHARE * usual:
            return "ok"
        is_direct = pair.path.startswith(_DIRECT_LINKS)
        return "fail" if is_direct and pair.gb_per_s < FAILED_SHARE * usual else "warn"

    def expected(self, pairs: Sequence[GpuPair], share: float = SLOW_SHARE) -> str:
        known = [rate for rate in map(self.rate, pairs) if rate is not None]
        if not known:
            return "measured only"
        return f">= {share * min(known):.3g} GB/s (the median of such pairs is {min(known):.3g})"


def _groups(pair: GpuPair) -> list[object]:
    """Return what pairs must have in common to be compared: the path, and the place on their nodes."""
    place = (pair.first, pair.second)
    return [pair.path, place] if pair.path else [place]


def _by_path(pairs: Sequence[GpuPair]) -> dict[str, list[GpuPair]]:
    found: dict[str, list[GpuPair]] = defaultdict(list)
    for pair in pairs:
        found[pair.path].append(pair)
    return found


def _check(path: str) -> str:
    return f"{_RATE}, {path}" if path else _RATE


def _range_text(pairs: Sequence[GpuPair]) -> str:
    rates = [pair.gb_per_s for pair in pairs]
    return f"{min(rates):.3g} to {max(rates):.3g} GB/s between {len(pairs)} pairs"


def _component(node: str, found: NodeMeasurements, pair: GpuPair) -> Component:
    return Component(node, f"{found.devices[pair.first].name} <-> {found.devices[pair.second].name}")
