"""Bytes that two hosts send each other over a slow link, and the time they take.

Two comparisons: gradients in plain fp32, in half precision and low-rank; and ZeRO 3's gathered weights with and without a second
partition inside each host.

The two hosts are two network namespaces with a cable (a veth pair) between them. A token bucket filter limits both ends. The
rate is set so that the plain run spends 35 % of its step reducing gradients; the other runs use the same rate. Bytes are those
that the sending interface counts. A variant's reduction includes its compression, but not the wait for a slower peer. ZeRO 3
gathers while it computes: there, the link's cost is the step's time at that rate compared with its time without a limit. Needs
root, iproute2 and util-linux.

python communication.py [--short]: --short only tries the machinery, and keeps no record.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.machine import MODULE_PATH, REPOSITORY, describe_machine, write_result
from longhaul.artifacts.paths import RunPaths

FOLDER = REPOSITORY / "build" / "bench-communication"
ADDRESSES = ("10.97.53.1", "10.97.53.2")
WARM_UP_STEPS = 6
STEPS, PROBE_STEPS, PROBES = 80, 16, 6
PLAIN_FRACTION, TOLERANCE, POWERSGD_FRACTION = 0.35, 0.03, 0.18
LOSS_BOUND = 1.05
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"data_type": "bf16"},
    "fp16": {"data_type": "fp16"},
    "powersgd": {"powersgd": {"rank": 4, "start_step": WARM_UP_STEPS - 2}},
}
# Weights are gathered for each pass, as for any model that does not fit into one GPU.
ZERO3 = {
    "stage": 3,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 1,
    "stage3_param_persistence_threshold": 0,
}
PARTITIONED: dict[str, dict[str, Any]] = {"zero3": ZERO3, "zero3-hpz": {**ZERO3, "zero_hpz_partition_size": 2}}
"""Two processes per host, so that a second partition inside the host has two ranks."""
NO_LIMIT_MBIT = 100_000.0
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Measured:
    """One run: seconds of a step and of the reduction in it, bytes sent in it (medians after the warm-up), and losses."""

    step_s: float
    reduction_s: float
    sent_bytes: float
    losses: list[float]

    @property
    def reduction_fraction(self) -> float:
        return self.reduction_s / self.step_s

    @property
    def end_loss(self) -> float:
        return statistics.mean(self.losses[-5:])


def main() -> int:
    """Set the rate, run every variant, print and keep the record. Return 1 when an aim is missed."""
    short = "--short" in sys.argv
    steps, probe_steps, probes = (12, 9, 2) if short else (STEPS, PROBE_STEPS, PROBES)
    prepare(steps)
    with two_hosts() as hosts:
        rate_mbit = calibrate(hosts, probe_steps, probes)
        found = {name: run(hosts, name, rate_mbit, steps) for name in VARIANTS}
        partitioned = {
            name: [run(hosts, name, rate, probe_steps, each=2) for rate in (rate_mbit, NO_LIMIT_MBIT)]
            for name in PARTITIONED
        }
    lines = [*describe_machine(("torch", "deepspeed", "transformers")), *report(found, rate_mbit, steps)]
    lines += report_partitioned(partitioned, probe_steps)
    if short:
        print(*lines, sep="\n")
    else:
        write_result("communication", lines)
    return int(not short and missed(found))


def prepare(steps: int) -> None:
    """Let the workflow build tokenizer, shards and one rendered stage per variant."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())
    stage = {
        "kind": "pretrain",
        "dataset": "stdlib",
        "steps": steps,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "sequence_length": 256,
        "gpus_per_node": 2,
        "precision": "fp32",
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "constant", "warmup_steps": WARM_UP_STEPS - 2},
        "zero": {"stage": 0},
    }
    site = yaml.safe_load((REPOSITORY / "config" / "sites" / "local.yaml").read_text())
    # Two processes on each of two hosts are four processes for the plan, although they share this machine's cores.
    (FOLDER / "site.yaml").write_text(yaml.safe_dump(site | {"node": {**site["node"], "cpus": 4}}))
    config |= {
        "run": "communication",
        "site": "./site.yaml",
        "model": {"llama": MODEL},
        "stages": [
            *({"name": name, **stage, "communication": keys} for name, keys in VARIANTS.items()),
            *(
                {"name": name, **stage, "gpus_per_node": 4, "micro_batch_size": 2, "zero": zero}
                for name, zero in PARTITIONED.items()
            ),
        ],
    }
    (FOLDER / "run.yaml").write_text(yaml.safe_dump(config))
    words = ["-s", str(REPOSITORY / "Snakefile"), "--directory", str(FOLDER), "--configfile", str(FOLDER / "run.yaml")]
    words += ["--profile", str(REPOSITORY / "profiles" / "local"), "--quiet", "all", "--"]
    subprocess.run(
        [sys.executable, "-m", "snakemake", *words, str(RunPaths("communication").manifest("stdlib"))], check=True
    )
    # Snakemake renders nothing when the data exists already.
    subprocess.run(
        [sys.executable, "-m", "longhaul", "job", "render", str(FOLDER / "run.yaml")], check=True, cwd=FOLDER
    )


@contextmanager
def two_hosts() -> Iterator[list[int]]:
    """Yield the ids of two processes with a network namespace each. They and the cable end with the block or this process."""
    holders: list[subprocess.Popen[bytes]] = []
    try:
        for _ in ADDRESSES:
            script = "ip link set lo up && echo up && exec sleep infinity"
            words = ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "sh", "-c", script]
            holders.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
            assert holders[-1].stdout and holders[-1].stdout.readline() == b"up\n"
        hosts = [holder.pid for holder in holders]
        cable = ["ip", "link", "add", "eth0", "netns", str(hosts[0]), "type", "veth"]
        subprocess.run([*cable, "peer", "name", "eth0", "netns", str(hosts[1])], check=True)
        for host, address in zip(hosts, ADDRESSES, strict=True):
            subprocess.run([*on(host), "ip", "addr", "add", f"{address}/24", "dev", "eth0"], check=True)
            subprocess.run([*on(host), "ip", "link", "set", "eth0", "up"], check=True)
        yield hosts
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def on(host: int) -> list[str]:
    """Return the command prefix that runs a command in the network of `host`."""
    return ["nsenter", f"--target={host}", "--net", "--"]


def limit(hosts: Sequence[int], rate_mbit: float) -> None:
    """Limit the rate of both ends of the cable; packets that wait are queued and never dropped."""
    for host in hosts:
        bucket = ["rate", f"{rate_mbit:.3f}mbit", "burst", "256kb", "limit", "256mb"]
        subprocess.run([*on(host), "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *bucket], check=True)


def calibrate(hosts: Sequence[int], steps: int, probes: int) -> float:
    """Return the rate in Mbit/s at which the plain run spends PLAIN_FRACTION of its step reducing gradients."""
    rate_mbit, target = 500.0, PLAIN_FRACTION / (1 - PLAIN_FRACTION)
    for _ in range(probes):
        found = run(hosts, "plain", rate_mbit, steps)
        print(
            f"at {rate_mbit:.0f} Mbit/s plain spends {found.reduction_fraction:.1%} of {found.step_s:.2f} s", flush=True
        )
        if abs(found.reduction_fraction - PLAIN_FRACTION) < TOLERANCE / 2:
            break
        # The reduction's time is proportional to the inverse of the rate; the rest of the step does not depend on it.
        rate_mbit *= found.reduction_fraction / (1 - found.reduction_fraction) / target
    return rate_mbit


def run(hosts: Sequence[int], variant: str, rate_mbit: float, steps: int, each: int = 1) -> Measured:
    """Train a variant for `steps` steps, with `each` processes on each host."""
    limit(hosts, rate_mbit)
    spec = str(RunPaths("communication").stage(variant).job_spec)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "found"
        worker = [
            sys.executable,
            "-m",
            "bench.communication_worker",
            spec,
            str(steps),
            str(out),
        ]
        world_size = each * len(hosts)
        shared = {
            "WORLD_SIZE": f"{world_size}",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29533",
            "GLOO_SOCKET_IFNAME": "eth0",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        places = [{"RANK": f"{rank}", "LOCAL_RANK": f"{rank % each}"} for rank in range(world_size)]
        ranks = [
            subprocess.Popen(
                [*on(hosts[rank // each]), *worker],
                cwd=FOLDER,
                env={**os.environ, **MODULE_PATH, **shared, **place},
                stdout=sys.stderr,
            )
            for rank, place in enumerate(places)
        ]
        codes = [rank.wait(timeout=3600) for rank in ranks]
        if any(codes):
            raise RuntimeError(f"{variant}: the processes ended with {codes}")
        return summary([json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(world_size)])


def summary(ranks: list[dict[str, list[float]]]) -> Measured:
    """Return the medians over the steps; of each step, the slower host's time and the longer reduction."""
    slowest = {
        key: statistics.median(list(map(max, zip(*(rank[key] for rank in ranks), strict=True)))[WARM_UP_STEPS:])
        for key in ("step_s", "reduction_s", "sent_bytes")
    }
    return Measured(**slowest, losses=ranks[0]["loss"])


def report(found: dict[str, Measured], rate_mbit: float, steps: int) -> list[str]:
    plain = found["plain"]
    lines = [
        f"Llama of hidden width {MODEL['hidden_size']}, {MODEL['num_hidden_layers']} layers, ZeRO 0, fp32, {steps} steps; "
        f"2 hosts with one process each, link limited to {rate_mbit:.0f} Mbit/s each way",
        f"{'reduction':10} {'MB sent/step':>13} {'step s':>8} {'reducing s':>11} {'share':>7} {'end loss':>9}",
    ]
    for name, one in found.items():
        lines.append(
            f"{name:10} {one.sent_bytes / 1e6:13.2f} {one.step_s:8.3f} {one.reduction_s:11.3f} {one.reduction_fraction:7.1%} "
            f"{one.end_loss:9.4f}"
        )
    compressed = found["powersgd"]
    lines += [
        f"powersgd sends {plain.sent_bytes / compressed.sent_bytes:.1f} times fewer bytes; its end loss is "
        f"{compressed.end_loss / plain.end_loss:.4f} of plain's (bound {LOSS_BOUND})",
        f"aim: plain {PLAIN_FRACTION:.0%} +- {TOLERANCE:.0%}, powersgd <= {POWERSGD_FRACTION:.0%} of the step: "
        f"{'missed' if missed(found) else 'reached'}",
    ]
    return lines


def report_partitioned(found: dict[str, list[Measured]], steps: int) -> list[str]:
    """Return the lines of the ZeRO 3 variants; found: variant -> its runs over the slow link and without a limit."""
    lines = [
        f"ZeRO 3, 2 processes on each host, {steps} steps; hpz: a second partition inside each host, for the backward pass",
        f"{'weights':10} {'MB sent/step':>13} {'step s':>8} {'unlimited s':>11} {'link':>7}",
    ]
    for name, (slow, free) in found.items():
        lines.append(
            f"{name:10} {slow.sent_bytes / 1e6:13.2f} {slow.step_s:8.3f} {free.step_s:11.3f} {1 - free.step_s / slow.step_s:7.1%}"
        )
    plain, hierarchical = (slow for slow, _ in found.values())
    return [*lines, f"hpz sends {plain.sent_bytes / hierarchical.sent_bytes:.2f} times fewer bytes between the hosts"]


def missed(found: dict[str, Measured]) -> bool:
    """Return whether a run misses its aim."""
    plain, compressed = found["plain"], found["powersgd"]
    is_set = abs(plain.reduction_fraction - PLAIN_FRACTION) <= TOLERANCE
    return not (
        is_set
        and compressed.reduction_fraction <= POWERSGD_FRACTION
        and compressed.end_loss <= LOSS_BOUND * plain.end_loss
    )


if __name__ == "__main__":
    sys.exit(main())
