"""Probe jobs: what they print is read, and a job that is refused, waits or ends without a result is explained."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from longhaul.config.gpu_datasheets import peak_tflops
from longhaul.planning.slurm_request import SlurmRequest
from longhaul.scheduling import probe_nodes as probes
from longhaul.scheduling.probe_nodes import SCRIPT, parse_probe, probe_nodes
from tests.support.fake_nvidia_smi import fake_nvidia_smi
from tests.support.supervised_job import fake_program

REQUEST = SlurmRequest(nodes=1, tasks_per_node=1, cpus_per_task=2, minutes=2, partition="gpu")
ROCM_SMI = """#!/bin/sh
echo 'device,VRAM Total Memory (B),VRAM Total Used Memory (B),Card Series,Card Model,Card Vendor,Card SKU'
echo 'card0,68702699520,10960896,AMD Instinct MI250X,0x7408,"Advanced Micro Devices, Inc. [AMD/ATI]",D65210'
echo 'card1,68702699520,10960896,AMD Instinct MI250X,0x7408,"Advanced Micro Devices, Inc. [AMD/ATI]",D65210'
"""
AMD_SMI = """#!/bin/sh
case "$1" in
version) echo 'AMDSMI Tool: 26.2.1+fc0010cf6a | AMDSMI Library version: 26.2.1 | ROCm version: 7.2.0';;
*) test "$*" = "static --asic --vram --json" && cat <<'END'
%s
END
esac
"""
MI300X = """\
    {
        "gpu": %d,
        "asic": {
            "market_name": "AMD Instinct MI300X",
            "vendor_name": "Advanced Micro Devices Inc. [AMD/ATI]",
            "num_compute_units": 304
        },
        "vram": {
            "type": "HBM3",
            "size": {
                "value": %s,
                "unit": "MB"
            }
        }
    }"""
GPUS = f"[\n{MI300X % (0, 196592)},\n{MI300X % (1, 196592)}\n]"
NO_MEMORY = '{"gpu": 2, "asic": {"market_name": "AMD Instinct MI300X"}, "vram": {"type": "N/A", "size": "N/A"}}'
SBATCH = """#!/bin/sh
for word; do case "$word" in --output=*) out=${word#--output=};; esac; done
%s
echo 7
"""


def printed(path: str = "/usr/bin:/bin") -> str:
    """Return what the probe script prints on this machine with this PATH."""
    environment = {"PATH": path, "SLURM_CPUS_ON_NODE": "24"}
    return subprocess.run(["sh", str(SCRIPT)], capture_output=True, text=True, check=True, env=environment).stdout


def test_node_with_nvidia_gpus_is_read(tmp_path: Path):
    node = parse_probe(printed(fake_nvidia_smi(tmp_path)))
    assert node.gpu_names == ("NVIDIA H200", "NVIDIA H200") and node.gpu_memory_gib == 140.4
    assert (node.toolkit, node.version, node.cpus) == ("cuda", "13.0", 24)
    assert node.host and node.memory_mib > 100 and "lo" in node.interfaces


def test_node_with_amd_gpus_is_read(tmp_path: Path):
    text = printed(fake_program(tmp_path, "rocm-smi", ROCM_SMI)).replace("end: probe", "rocm: 6.4.1-83\nend: probe")
    node = parse_probe(text)
    assert node.gpu_names == ("AMD Instinct MI250X",) * 2 and node.gpu_memory_gib == 63.9
    assert (node.toolkit, node.version) == ("rocm", "6.4")


@pytest.mark.parametrize(
    "output",
    [
        GPUS,
        f'{{\n"gpu_data": {GPUS}\n}}',
        f"WARNING: User is missing the following required groups: render\n{GPUS}",
        f"[WARNING] {{1}} User is missing the following required groups: render\n{GPUS}",
        GPUS.replace("\n]", f",\n{MI300X % (2, chr(34) + 'N/A' + chr(34))}\n]"),
        GPUS.replace("\n]", f",\n{NO_MEMORY}\n]"),
    ],
    ids=["ROCm 6", "ROCm 7", "warning", "warning with brackets", "part of a GPU", "part without an object"],
)
@pytest.mark.parametrize("has_rocm_smi", [False, True])
def test_amd_smi_is_asked_where_it_is_installed(tmp_path: Path, output: str, has_rocm_smi: bool):
    path = fake_program(tmp_path, "amd-smi", AMD_SMI % output)
    if has_rocm_smi:
        fake_program(tmp_path, "rocm-smi", ROCM_SMI)
    node = parse_probe(printed(path))
    assert node.gpu_names == ("AMD Instinct MI300X",) * 2 and node.gpu_memory_gib == 191.9
    assert (node.toolkit, node.version) == ("rocm", "7.2")


@pytest.mark.parametrize(
    "output", ["", "amdsmi: no driver", "{", "[]", "{}", "[1]", '{"gpu_data": [{"asic": {}}]}', "null"]
)
def test_rocm_smi_counts_where_amd_smi_shows_no_gpu(tmp_path: Path, output: str):
    fake_program(tmp_path, "amd-smi", AMD_SMI % output)
    node = parse_probe(printed(fake_program(tmp_path, "rocm-smi", ROCM_SMI)))
    assert node.gpu_names == ("AMD Instinct MI250X",) * 2


@pytest.mark.parametrize("has_program", [False, True])
def test_node_without_gpus_is_read(tmp_path: Path, has_program: bool):
    node = parse_probe(printed(fake_nvidia_smi(tmp_path, host="another")) if has_program else printed())
    assert (node.gpu_names, node.gpu_memory_gib, node.toolkit, node.version) == ((), None, None, None)


def test_ports_are_read():
    node = parse_probe("host: n1\nrdma_port: InfiniBand\nrdma_port: InfiniBand\ncpus: no number\nend: probe\n")
    assert node.rdma_ports == ("InfiniBand", "InfiniBand") and node.cpus == 0


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM-64GB", 312),
        ("NVIDIA H100 PCIe", 756),
        ("AMD Instinct MI250X", 191.5),
    ],
)
def test_rates_are_those_of_the_datasheets(name: str, rate: float):
    assert peak_tflops(name) == rate


def test_rate_of_another_gpu_is_not_known():
    assert peak_tflops("Tesla V100-SXM2-32GB") is None


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake sbatch, scontrol and scancel; tests replace the first two."""
    monkeypatch.setattr(probes, "_POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr(probes, "_OUTPUT_WAIT_S", 0.2)
    monkeypatch.chdir(tmp_path)
    fake_program(tmp_path, "sbatch", SBATCH % 'sh "$word" > "$out"')
    fake_program(tmp_path, "scancel", f'#!/bin/sh\necho "$*" > "{tmp_path}/cancelled"\n')
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", "#!/bin/sh\necho 'JobState=COMPLETED Reason=None'\n"))
    return tmp_path


def test_job_returns_what_its_node_has(slurm: Path):
    answers = probe_nodes({"gpu": REQUEST, "cpu": replace(REQUEST, partition=None)}, 1)
    assert [answer.node is not None for answer in answers.values()] == [True, True]
    assert not (slurm / "cancelled").exists() and not list(slurm.glob("longhaul-probe-*"))


def test_refused_job_is_explained_and_the_others_run(slurm: Path):
    refusal = (
        'case "$*" in *--account=poor*) echo "sbatch: error: Invalid account" >&2; exit 1;; esac; sh "$word" > "$out"'
    )
    fake_program(slurm, "sbatch", SBATCH % refusal)
    answers = probe_nodes({"gpu": replace(REQUEST, account="poor"), "cpu": REQUEST}, 1)
    assert answers["gpu"].problem == "refused: Invalid account" and "correct account" in answers["gpu"].remedy
    assert answers["cpu"].node is not None


def test_ctrl_c_between_two_submissions_cancels_the_first_job(slurm: Path, monkeypatch: pytest.MonkeyPatch):
    submit = probes.slurm_client.submit

    def interrupted(options: list[str], script: Path) -> str:
        if "--partition=cpu" in options:
            raise KeyboardInterrupt
        return submit(options, script)

    monkeypatch.setattr(probes.slurm_client, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe_nodes({"gpu": REQUEST, "cpu": replace(REQUEST, partition="cpu")}, 1.0)
    assert (slurm / "cancelled").read_text().split() == ["7"] and not list(slurm.glob("longhaul-probe-*"))


@pytest.mark.parametrize(
    ("reason", "minutes", "problem"),
    [
        ("QOSMaxNodePerJobLimit", 10, "job 7 cannot start: PENDING, QOSMaxNodePerJobLimit"),
        ("Priority", 0, "job 7 did not end in time: PENDING, Priority"),
    ],
)
def test_job_that_does_not_start_is_explained_and_cancelled(slurm: Path, reason: str, minutes: float, problem: str):
    fake_program(slurm, "scontrol", f"#!/bin/sh\necho 'JobState=PENDING Reason={reason}'\n")
    answer = probe_nodes({"gpu": REQUEST}, minutes)["gpu"]
    assert answer.node is None and answer.problem == problem and answer.remedy
    assert (slurm / "cancelled").read_text().split() == ["7"]


def test_job_whose_provisional_reason_becomes_a_limit_is_explained_by_the_limit(slurm: Path):
    once = f"mkdir '{slurm}/asked' 2>&- && reason=PartitionConfig || reason=PartitionNodeLimit"
    fake_program(slurm, "scontrol", f'#!/bin/sh\n{once}\necho "JobState=PENDING Reason=$reason"\n')
    assert probe_nodes({"gpu": REQUEST}, 1)["gpu"].problem == "job 7 cannot start: PENDING, PartitionNodeLimit"


def test_job_that_ends_without_a_result_is_explained(slurm: Path):
    fake_program(slurm, "sbatch", SBATCH % 'echo "slurmstepd: error: no space left" > "$out"')
    answer = probe_nodes({"gpu": REQUEST}, 1)["gpu"]
    assert answer.problem == "job 7 ended without a result: slurmstepd: error: no space left"
