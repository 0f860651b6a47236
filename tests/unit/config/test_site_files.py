"""Mistakes in site files: keys of the old form, options that longhaul sets itself. Origin of the centres' files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from longhaul.config.load_config import is_site_file, load_site
from longhaul.config.slurm_options import RESERVED_SBATCH_OPTIONS, RESERVED_SRUN_EXTRA
from longhaul.errors import UserError
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import SITE, changed, write_config

# The form of site files before partitions had options of their own.
OLD_SITE = """\
name: slurm-gres
scheduler: slurm
partitions:
  gpu: {name: accelerated, max_minutes: 2880, max_nodes: 64}
  cpu: {name: cpuonly, max_minutes: 4320}
max_nodes: 64
node: {cpus: 152, memory_mb: 501600, gpus: 4}
account: my-project
qos: normal
constraint: a100
reservation: course
gpu_request: gres
gpu_type: a100
memory: all
exclusive: true
cuda_build: cu130
"""
MOVED = (
    "max_nodes",
    "node",
    "account",
    "qos",
    "constraint",
    "reservation",
    "gpu_request",
    "gpu_type",
    "memory",
    "exclusive",
)


def refusal(folder: Path, text: str) -> str:
    (folder / "site.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load_site("./site.yaml", folder)
    return str(refused.value)


def test_each_key_of_the_old_form_is_named_with_its_new_place(tmp_path: Path):
    message = refusal(tmp_path, OLD_SITE)
    assert all(f"{key} is not a known key; it is a key of partitions" in message for key in MOVED), message
    assert 'cuda_build is not a known key; write accelerator: {cuda: "13.0"}' in message
    assert "partitions is {" in message and "expected: a list, whose items begin with `- `" in message


@pytest.mark.parametrize(
    ("key", "place"),
    [
        *(
            (key, "partitions")
            for key in ("max_minutes", "sbatch_extra", "gres_extra", "threads_per_core", "cpu_bind", "jobs")
        ),
        *((key, "partitions.node") for key in ("cpus", "memory_mb", "gpus", "gpu_memory_gib", "gpu_peak_tflops")),
        *((key, "interconnect") for key in ("socket_interface", "master_address", "limits")),
        ("modules", "software"),
        ("nvlinks", "node_minimums"),
        ("partitions.0.memory_mb", "node"),
        ("partitions.0.gpus", "node"),
    ],
)
def test_key_in_the_wrong_place_is_named_with_its_section(key: str, place: str, tmp_path: Path):
    """gres_extra is similar to srun_extra, and memory_mb to memory, but they are no misspelled ones."""
    message = refusal(tmp_path, yaml.safe_dump(changed(SITE, {key: 1})))
    assert f"{key.replace('.0.', '.gpu.')} is not a known key; it is a key of {place}\n" in message


@pytest.mark.parametrize(
    ("key", "reserved"),
    [
        ("partitions.0.sbatch_extra", RESERVED_SBATCH_OPTIONS),
        ("srun_extra", RESERVED_SRUN_EXTRA),
    ],
)
def test_each_option_that_breaks_a_job_is_refused_with_its_reason(key: str, reserved: dict[str, str], tmp_path: Path):
    accepted = [
        option
        for option, reason in reserved.items()
        if f"contains {option}, which {reason}"
        not in refusal(tmp_path, yaml.safe_dump(changed(SITE, {key: [f"{option}=1"]})))
    ]
    assert accepted == []


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--account=a", "the key account of the partition"),
        ("--partition=p", "the key name of the partition"),
        ("--cpu-bind=cores", "the key cpu_bind of the partition"),
        ("--gpu-bind=closest", "the key gpu_bind of the partition"),
        ("--gres=nvme:1", "gres_extra of the partition"),
        ("--mem=1000", "the key memory or node.memory_mb of the partition"),
        ("--no-requeue", "the key requeue of the site"),
        ("--nodelist=n1", "constraint or reservation of the partition"),
        ("--time=10", "max_minutes"),
        ("--environment=/images/job.toml", "software: {kind: srun, options: […]}"),
        ("--container-image=/images/job.sqsh", "software: {kind: srun, options: […]}"),
    ],
)
def test_refused_option_of_sbatch_names_the_key_that_replaces_it(option: str, remedy: str, tmp_path: Path):
    assert remedy in refusal(tmp_path, yaml.safe_dump(changed(SITE, {"partitions.0.sbatch_extra": [option]})))


def test_containers_of_srun_need_slurm(tmp_path: Path):
    keys = {"scheduler": "local", "partitions.0.max_nodes": 1, "partitions.0.gpu_request": "none"}
    software = {"software": {"kind": "srun", "options": ["--container-image=/images/job.sqsh"]}}
    message = refusal(tmp_path, yaml.safe_dump(changed(SITE, {**keys, **software})))
    assert "software.kind srun with scheduler local" in message and "use kind container" in message


def test_options_that_the_executor_plugin_refuses_are_refused_before_any_job():
    """The plugin would end the run when it submits the first job."""
    from snakemake_executor_plugin_slurm.validation import get_forbidden_slurm_options

    patterns = [re.compile(pattern) for pattern in get_forbidden_slurm_options()]
    known = [pattern for pattern in patterns if any(pattern.search(f"{name}=1") for name in RESERVED_SBATCH_OPTIONS)]
    assert known == patterns and len(patterns) > 10


def test_options_that_longhaul_does_not_set_are_accepted(tmp_path: Path):
    options = [
        "--mail-type=END",
        "--licenses=scratch",
        "--network=single_node_vni",
        "--signal=R:TERM@60",
        "--switches=1",
    ]
    options += ["--core-spec=8", "--wait-all-nodes=1", "--nice", "--spread-job"]
    write_config(tmp_path, None, {"partitions.0.sbatch_extra": options})
    assert load_site("./site.yaml", tmp_path).partitions[0].sbatch_extra == tuple(options)


def test_resources_that_are_no_second_request_for_gpus_are_accepted(tmp_path: Path):
    others = ["gpu_mem:80G", "nvme:100", "mygpu:1"]
    write_config(tmp_path, None, {"partitions.0.gres_extra": others})
    assert load_site("./site.yaml", tmp_path).partitions[0].gres_extra == tuple(others)
    write_config(tmp_path, None, {"partitions.0.gpu_request": "none", "partitions.0.gres_extra": ["gpu:8"]})
    assert load_site("./site.yaml", tmp_path).partitions[0].gres_extra == ("gpu:8",)


def test_site_files_and_configs_are_told_apart(tmp_path: Path):
    config = write_config(tmp_path)
    (tmp_path / "old.yaml").write_text(OLD_SITE)
    assert [is_site_file(tmp_path / name) for name in ("site.yaml", "old.yaml")] == [True, True]
    assert not is_site_file(config)


SITE_FILES = REPOSITORY / "config" / "sites"
CENTRES = sorted(path.stem for path in SITE_FILES.glob("*.yaml") if not path.stem.startswith(("local", "slurm-")))


@pytest.mark.parametrize("site", CENTRES)
def test_site_files_of_centres_say_what_they_follow_and_that_they_were_not_run(site: str):
    comments = (SITE_FILES / f"{site}.yaml").read_text().split("\nname:")[0]
    assert re.search(r"Written from documentation on \d+ [A-Z]\w+ 20\d\d, not run there\.", comments)
    pages = comments.split("# Pages")[1].split("# Checkpoints")[0]
    assert re.search(r"^#   https?://\S+\.\S+", pages, flags=re.MULTILINE)
    uses_rocm = load_site(site, REPOSITORY).accelerator.rocm is not None
    assert ("longhaul was not run on AMD GPUs." in comments) == uses_rocm
