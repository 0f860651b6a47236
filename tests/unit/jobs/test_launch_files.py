"""Launch files: their text, that DeepSpeed reads every key, and that no value is interpreted by a shell."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.paths import JobId
from longhaul.artifacts.site_baseline import SiteBaseline, UsualRate, baseline_path
from longhaul.config.load_config import load_site
from longhaul.config.shipped_files import PACKAGE
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_kinds, job_spec, jobs_of, jobs_on_demand
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.jobs.launch_files import render_controller, render_job, render_run, write_launch_files
from longhaul.planning import Plan
from longhaul.planning.deepspeed_config import deepspeed_sections
from tests.golden.regenerate import CASES, GOLDEN, SERVERS, SITES, rendered, rendered_headers, rendered_server
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import SITE, plan_of
from tests.support.supervised_job import fake_program


@pytest.mark.parametrize("case", CASES)
def test_rendered_files_equal_the_golden_files(case: str):
    """After an intended change: run make generate and read the difference."""
    texts = rendered(case)
    assert texts == {name: (GOLDEN / case / name).read_text() for name in texts}


@pytest.mark.parametrize("case", SERVERS)
def test_plans_of_servers_equal_the_golden_file(case: str):
    assert rendered_server(case) == (GOLDEN / "servers" / f"{case}.txt").read_text()


def test_a_server_with_its_own_python_runs_outside_of_the_job_environment(tmp_path: Path):
    """The engine's Python may start a container, which must not be inside of the job's container."""
    software = {"kind": "container", "path": "/images/job.sif"}
    for python, inside in ([], True), (["/vllm/bin/python"], False):
        site = {"software": software, "serving": {"engine": "vllm", "python": python}}
        plan = plan_of(tmp_path, {"stages.0.export": "last"}, site)
        (step,) = json.loads(render_job(plan, JobId("serve", ("base",)), tmp_path).files["launch.json"])["steps"]
        assert ("apptainer" in step["command"], sys.executable not in step["command"]) == (inside, inside)


@pytest.mark.parametrize(("gpus", "is_off"), [(4, True), (8, False)])
def test_a_server_on_a_part_of_a_node_does_not_take_nvlink_multicast(tmp_path: Path, gpus: int, is_off: bool):
    serve = {"nodes": 1, "gpus_per_node": gpus}
    plan = plan_of(tmp_path, {"stages.0.export": "last", "stages.0.serve": serve}, {"serving": {"engine": "vllm"}})
    script = render_job(plan, JobId("serve", ("base",)), tmp_path).files["launch.sh"]
    assert ("NCCL_NVLS_ENABLE" in script) == is_off


def test_servers_are_no_jobs_of_the_pipeline(tmp_path: Path):
    plan = plan_of(tmp_path, {"stages.0.export": "last"})
    assert jobs_on_demand(plan) == [JobId("serve", ("base",))]
    assert not {job.kind for job in jobs_of(plan)} & {"serve"}
    assert not [path for path in render_run(plan, tmp_path) if "serve" in path.name]


CENTRES_PAGE = REPOSITORY / "docs" / "sites.md"
CENTRES = sorted(name for name in SITES if not name.startswith("slurm-"))


@pytest.mark.parametrize("site", SITES)
def test_headers_at_every_shipped_site_equal_the_golden_file(site: str):
    assert rendered_headers(site) == (GOLDEN / "sites" / f"{site}.txt").read_text()


@pytest.mark.parametrize("site", SITES)
def test_the_golden_file_of_a_site_has_every_kind_of_job(site: str):
    jobs = re.findall(r"^== (\w+)", (GOLDEN / "sites" / f"{site}.txt").read_text(), flags=re.MULTILINE)
    step_of_the_fabric_check = "nccl_tests"
    assert set(jobs) - {"controller"} == set(job_kinds()) - {step_of_the_fabric_check}


@pytest.mark.parametrize("site", SITES)
def test_evaluations_and_servers_ask_for_what_a_training_on_one_gpu_asks_for(site: str):
    """The same partition, account, QOS, constraint, cores, memory and GPU; only the time is their own."""
    train, *others = (
        options_of(site, job) for job in ("train-chat", "evaluate-base", "serve_check-base", "serve-base")
    )
    assert len(train) > 5 and others == [train] * 3


def options_of(site: str, job: str) -> set[str]:
    """Return the sbatch options of a job, without those that have the job's name or time."""
    header = (GOLDEN / "sites" / f"{site}.txt").read_text().split(f"\n== {job}")[1].split("\n== ")[0]
    return set(re.findall(r"^#SBATCH (?!--job-name|--time|--output)(\S+)", header, flags=re.MULTILINE))


def test_the_page_of_centres_shows_rendered_options():
    """Column 2 of docs/sites.md is the training job's; options in column 3 belong to other jobs of the same site."""
    assert sorted(sections_of_centres()) == CENTRES
    for site, section in sections_of_centres().items():
        rendered_text = (GOLDEN / "sites" / f"{site}.txt").read_text()
        training = training_job(site)
        for _, ours, others in rows_of(section):
            missing = [option for option in re.findall(r"`(--[^`…]+)", ours) if option not in training]
            missing += [option for option in re.findall(r"`(--[^`…]+)", others) if option not in rendered_text]
            assert not missing, (site, missing)


@pytest.mark.parametrize("site", CENTRES)
def test_the_page_of_centres_shows_every_option_of_the_training_job(site: str):
    """Options of every centre stand in the first table; there the name is enough, as run and stage choose the value."""
    everywhere = {option.split("=")[0] for option in shown_options(CENTRES_PAGE.read_text().split("\n## ")[0])}
    shown = shown_options(sections_of_centres()[site])
    header = re.findall(r"^#SBATCH (\S+)", training_job(site), flags=re.MULTILINE)
    step = re.findall(r"^srun ((?:--\S+ )+)", training_job(site), flags=re.MULTILINE)[-1].split()
    missing = [
        option for option in [*header, *step] if option.split("=")[0] not in everywhere and not is_shown(option, shown)
    ]
    assert header and not missing


def sections_of_centres() -> dict[str, str]:
    sections = CENTRES_PAGE.read_text().split("\n## Limits")[0].split("\n## ")[1:]
    return {re.findall(r"`([\w-]+)`", section)[0]: section for section in sections}


def training_job(site: str) -> str:
    return (GOLDEN / "sites" / f"{site}.txt").read_text().split("== train-base")[1].split("\n== ")[0]


def rows_of(text: str) -> list[list[str]]:
    return [row.split("|")[1:4] for row in re.findall(r"^\| (?!documented|---).*", text, flags=re.MULTILINE)]


def shown_options(text: str) -> list[str]:
    return [option for _, ours, _ in rows_of(text) for option in re.findall(r"`(--[^`]+)", ours)]


def is_shown(option: str, shown: list[str]) -> bool:
    """An option that ends with … on the page is cut there."""
    return option in shown or any(text.endswith("…") and option.startswith(text[:-1]) for text in shown)


def test_the_page_of_centres_states_the_limits_of_the_site_files():
    table = CENTRES_PAGE.read_text().split("\n## Limits")[1].split("\n## ")[0]
    rows = [row.split("|")[1:3] for row in re.findall(r"^\| .*\d.* \|$", table, flags=re.MULTILINE)]
    assert len(rows) == 9
    for centre, limits in rows:
        name = next(name for name in SITES if name.replace("-", "") == centre.lower().replace(" ", ""))
        written = {partition.max_nodes for partition in load_site(name, REPOSITORY).partitions}
        assert {int(number) for number in re.findall(r"(\d+) nodes", limits)} <= written, name


def test_zero3_settings_of_a_common_guide_are_rendered_key_for_key():
    found = json.loads((GOLDEN / "zero3_offload" / "ds_config.json").read_text())
    assert found["train_micro_batch_size_per_gpu"] == 4 and found["gradient_accumulation_steps"] == 8
    assert found["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    }
    assert found["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
    }
    assert found["fp16"]["loss_scale"] == 0 and found["fp16"]["loss_scale_window"] == 1000
    assert found["gradient_clipping"] == 1.0, "the guide's grad_clip is no key of DeepSpeed"


class Recording(dict):
    """A dictionary that records which of its keys were read."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __copy__(self) -> Recording:
        return self


def unread(config: dict[str, Any]) -> set[str]:
    """Return the top-level keys that DeepSpeed's config class does not read. It raises for unknown nested keys."""
    from deepspeed.runtime.config import DeepSpeedConfig

    recording = Recording(copy.deepcopy(config))
    DeepSpeedConfig(recording)
    return set(config) - recording.read


EVERYTHING = {
    "stages.0.precision": "fp16",
    "stages.0.zero": {
        "stage": 3,
        "offload_optimizer": "cpu",
        "offload_param": "cpu",
        "reduce_bucket_size": 1000,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_param_persistence_threshold": 10,
        "stage3_max_live_parameters": 1000,
        "stage3_max_reuse_distance": 0,
    },
}
LAYOUTS = [
    {"stages.0.zero": {"stage": 2}, "stages.0.communication": {"data_type": "fp32"}, "stages.0.precision": "bf16"},
    {
        "stages.0.zero": {"stage": 1, "reduce_bucket_size": 1000},
        "stages.0.gpus_per_node": 2,
        "stages.0.communication": {"powersgd": {}},
    },
    {"stages.0.zero": {"stage": 0}},
    {"stages.0.zero": {"stage": 1, "allgather_bucket_size": 1000}, "stages.0.precision": "bf16"},
    {"stages.0.zero": {"stage": 2, "offload_optimizer": "cpu"}},
    EVERYTHING,
    {"stages.0.zero": {"stage": 3, "offload_optimizer": "nvme"}, "storage": {"scratch": "/local"}},
    {
        "stages.0.zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme"},
        "storage": {"scratch": "/local"},
    },
    {"stages.0.zero": {"stage": 3, "zero_hpz_partition_size": 2}, "stages.0.gpus_per_node": 2},
    {
        "stages.0.zero": {"stage": 1},
        "stages.0.gpus_per_node": 4,
        "stages.0.parallel": {"pipeline": 2, "tensor": 2},
    },
]


@pytest.mark.parametrize("changes", LAYOUTS, ids=lambda changes: f"ZeRO {changes['stages.0.zero']['stage']}")
def test_deepspeed_reads_every_key(tmp_path: Path, changes: dict[str, Any]):
    plan = plan_of(tmp_path, changes)
    assert unread(deepspeed_sections(plan.stages[0], plan.site)) == set()


def test_deepspeed_reduces_in_the_stated_precision(tmp_path: Path):
    """PowerSGD also switches overlap_comm off."""
    from deepspeed.runtime.config import DeepSpeedConfig

    for name, expected in {
        "bf16": "torch.bfloat16",
        "fp16": "torch.float16",
        "fp32": "torch.float32",
        None: "None",
    }.items():
        plan = plan_of(tmp_path, {"stages.0.communication": {"data_type": name}})
        assert str(DeepSpeedConfig(deepspeed_sections(plan.stages[0], plan.site)).communication_data_type) == expected
    plan = plan_of(tmp_path, {"stages.0.communication": {"powersgd": {}}, "stages.0.gpus_per_node": 2})
    assert deepspeed_sections(plan.stages[0], plan.site)["zero_optimization"]["overlap_comm"] is False


def test_a_key_that_deepspeed_ignores_is_noticed(tmp_path: Path):
    plan = plan_of(tmp_path, EVERYTHING)
    sections = deepspeed_sections(plan.stages[0], plan.site)
    assert unread({**sections, "gradient_cliping": 1.0}) == {"gradient_cliping"}
    sections["zero_optimization"]["overlap_com"] = True
    with pytest.raises(Exception, match="overlap_com"):
        unread(sections)


def test_adam_is_torchs_fused_one_and_deepspeeds_with_offload(tmp_path: Path):
    def optimizer(changes: dict[str, Any], site: dict[str, Any] | None = None) -> dict[str, Any]:
        plan = plan_of(tmp_path, changes, site)
        return deepspeed_sections(plan.stages[0], plan.site)["optimizer"]["params"]

    assert optimizer({})["torch_adam"] and optimizer({})["fused"]
    assert "fused" not in optimizer({}, {"partitions.0.node.gpus": 0, "accelerator": "cpu"})
    assert "torch_adam" not in optimizer({"stages.0.zero": {"stage": 1, "offload_optimizer": "cpu"}})


HOSTILE = [
    "a b",
    "it's",
    '"quoted"',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "#SBATCH --nodes=99",
    "\\",
    "é",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_an_environment_value_reaches_the_job_unchanged(tmp_path: Path, value: str):
    plan = plan_of(tmp_path, None, {"environment": {"SHOWN": value}})
    launch = render_job(plan, JobId("train", ("base",)), tmp_path).files["launch.sh"]
    exports = "\n".join(line for line in launch.splitlines() if line.startswith("export "))
    shown = subprocess.run(
        ["bash", "-c", exports + '\nprintf %s "$SHOWN"'], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout == value
    assert not (tmp_path / "pwned").exists()


def test_an_image_path_with_special_characters_stays_one_word(tmp_path: Path):
    software = {"kind": "container", "path": "/images/$(touch pwned) a.sif"}
    launch = render_job(plan_of(tmp_path, None, {"software": software}), JobId("train", ("base",)), tmp_path).files[
        "launch.json"
    ]
    for step in json.loads(launch)["steps"]:
        assert step["command"][-8:-6] == ["/images/$(touch pwned) a.sif", "python3"]


MODULE = 'module() { echo "$HARMLESS_BUT_UNSET" > /dev/null; export LOADED="${LOADED:-} $2"; }'


def loaded_modules(folder: Path, first_lines: str = "", **environment: str) -> tuple[list[str], str]:
    """Return the modules that launch.sh loads before it starts Python, and the flags of its shell then."""
    software = {"kind": "modules", "modules": ["cuda/13.0", "python"]}
    launch = render_job(plan_of(folder, None, {"software": software}), BASE, folder).files["launch.sh"]
    before_python = launch[: launch.index("exec ")]
    shown = subprocess.run(
        ["bash", "-c", f'{first_lines}\n{before_python}\necho "$LOADED $-"'],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert shown.returncode == 0, shown.stderr
    *loaded, flags = shown.stdout.split()
    return loaded, flags


def test_modules_may_use_unset_variables(tmp_path: Path):
    """Lmod and Tcl modules do so; afterwards the script fails again on unset variables."""
    loaded, flags = loaded_modules(tmp_path, MODULE)
    assert loaded == ["cuda/13.0", "python"] and {"e", "u"} <= set(flags)


def test_module_is_defined_where_login_shells_alone_have_it(tmp_path: Path):
    """At Jean Zay, the shell of a job does not have it."""
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text(f"false\n{MODULE}\n")
    loaded, flags = loaded_modules(tmp_path, MODULESHOME=str(tmp_path))
    assert loaded == ["cuda/13.0", "python"] and {"e", "u"} <= set(flags)


def binds(plan: Plan, folder: Path, job: JobId) -> list[str]:
    step = json.loads(render_job(plan, job, folder).files["launch.json"])["steps"][0]["command"]
    return [step[i + 1] for i, word in enumerate(step) if word == "--bind"]


def test_a_container_binds_data_folders_and_link_targets(tmp_path: Path):
    for name in ("data", "real", "tokenizer", "blobs", "run/own"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "real" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "data" / "a.jsonl").symlink_to(tmp_path / "real" / "a.jsonl")
    (tmp_path / "run" / "own" / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "blobs" / "0123").write_text("{}")
    (tmp_path / "tokenizer" / "tokenizer.json").symlink_to(tmp_path / "blobs" / "0123")
    config = {
        "datasets.prose": {"kind": "text", "files": ["data/*.jsonl", "run/own/*.jsonl"]},
        "tokenizer": {"path": "tokenizer"},
        "storage": {"weights": "/scratch/weights", "data": "shards"},
    }
    site = {"software": {"kind": "container", "path": "/job.sif", "binds": ["/cvmfs", "/a:/b"]}}
    plan = plan_of(tmp_path, config, site, Lock({"chats": {"path": "x", "files": ["/hub/chats.jsonl"]}}))
    run = tmp_path / "run"
    always = ["/dev/shm", str(REPOSITORY), str(run), "/scratch/weights"]
    assert binds(plan, run, JobId("environment")) == [*always, "/cvmfs", "/a:/b"]
    assert binds(plan, run, JobId("tokenize", ("prose",))) == [
        *always,
        *(str(tmp_path / n) for n in ("data", "real")),
        "/cvmfs",
        "/a:/b",
    ]
    assert binds(plan, run, JobId("tokenize", ("chats",))) == [*always, "/hub", "/cvmfs", "/a:/b"]
    assert binds(plan, run, JobId("tokenizer")) == [
        *always,
        *(str(tmp_path / n) for n in ("tokenizer", "blobs")),
        "/cvmfs",
        "/a:/b",
    ]


@pytest.mark.parametrize("name", ["a:b", "a,b"])
def test_a_folder_with_a_bind_separator_is_refused_until_it_is_moved(tmp_path: Path, name: str):
    software = {"kind": "container", "path": "/images/job.sif"}
    plan = plan_of(tmp_path, {"storage": {"weights": f"/scratch/{name}"}}, {"software": software})
    with pytest.raises(UserError, match="separates folders"):
        render_job(plan, JobId("train", ("base",)), tmp_path / "run")
    moved = plan_of(tmp_path, {"storage": {"weights": "/scratch/a-b"}}, {"software": software})
    render_job(moved, JobId("train", ("base",)), tmp_path / "run")


@pytest.mark.parametrize("name", ["with'quote", 'with"quote', "with$dollar", "with`tick", "per%cent"])
def test_a_working_folder_that_sbatch_would_misread_is_refused(tmp_path: Path, name: str):
    plan = plan_of(tmp_path / "config")
    with pytest.raises(UserError, match="working folder"):
        render_job(plan, JobId("train", ("base",)), tmp_path / name)


def test_sbatch_headers_contain_only_options(tmp_path: Path):
    folder = tmp_path / "with a blank"
    plan = plan_of(tmp_path)
    sbatch = render_job(plan, JobId("train", ("base",)), folder).files["job.sbatch"]
    write_launch_files(plan, folder)
    (log,) = re.findall(r'--output="(.*)"', sbatch)
    assert Path(log).parent.is_dir(), "Slurm starts no job whose log has no folder"
    body = [line for line in sbatch.splitlines() if not line.startswith("#")]
    assert body == [f"exec bash '{folder}/results/small/stages/base/launch.sh'"]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S.*)?", line) for line in sbatch.splitlines()[2:-1])


def test_rendering_twice_changes_no_file(tmp_path: Path):
    (tmp_path / "prose.jsonl").write_text('{"text": "a"}\n')
    changes = {
        "datasets": {"prose": {"kind": "text", "files": ["prose.jsonl"]}},
        "stages": [yaml.safe_load("{name: base, kind: pretrain, dataset: prose, steps: 1, global_batch_size: 1, "
                                  "sequence_length: 8, precision: fp32}")],
    }  # fmt: skip
    plan = plan_of(tmp_path, changes)
    write_launch_files(plan, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("results/**/*") if path.is_file()}
    assert {"launch.sh", "job.sbatch", "ds_config.json", "job.json"} <= {path.name for path in before}
    write_launch_files(plan, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_slurms_client_runs_outside_the_container(tmp_path: Path):
    """The supervisor and srun run outside; only Python runs in the container."""
    software = {"kind": "container", "path": "/images/job.sif"}
    files = render_job(plan_of(tmp_path, None, {"software": software}), JobId("train", ("base",)), tmp_path).files
    assert "apptainer" not in files["launch.sh"], "the supervisor asks Slurm, so it runs outside"
    steps = json.loads(files["launch.json"])["steps"]
    assert len(steps) == 2
    for step in steps:
        inside = step["command"][step["command"].index("apptainer") :]
        assert step["command"][0] == "srun" and "srun" not in inside and "supervise" not in inside


BASE = JobId("train", ("base",))


def commands(
    folder: Path, site: dict[str, Any], job: JobId = BASE, config: dict[str, Any] | None = None
) -> list[list[str]]:
    """Return the commands of a job's steps with these changes of the site and the config."""
    launch = render_job(plan_of(folder, config, site), job, folder / "run").files["launch.json"]
    return [step["command"] for step in json.loads(launch)["steps"]]


@pytest.mark.parametrize(("nodes", "pair_checks"), [(1, 0), (2, 0), (3, 1)])
def test_training_on_three_nodes_measures_their_pairs_before_each_attempt(tmp_path: Path, nodes: int, pair_checks: int):
    config = {"stages.0.nodes": nodes, "stages.0.gpus_per_node": 2, "stages.0.global_batch_size": 24}
    files = render_job(plan_of(tmp_path, config, {"partitions.0.max_nodes": 4}), BASE, tmp_path / "run").files
    steps = [step["command"] for step in json.loads(files["launch.json"])["steps"]]
    kinds = [command[command.index("run") + 1] for command in steps]
    assert kinds == ["environment", *["fabric"] * pair_checks, "train"]
    if pair_checks:
        assert f"--ntasks={2 * nodes}" in steps[1]
        spec = json.loads(files["pair_check.json"])
        assert (spec["nodes"], spec["gpus_per_node"], spec["pairs_only"]) == (nodes, 2, True)
        assert (spec["out"], spec["folder"]) == ("results/small/stages/base/pairs.json", "results/small/stages/base")


def test_training_on_two_nodes_measures_their_pair_where_the_site_has_a_baseline_of_its_network(tmp_path: Path):
    config = {"stages.0.nodes": 2, "stages.0.gpus_per_node": 2, "stages.0.global_batch_size": 24}
    rate = UsualRate(median=20.0, lowest=18.0, highest=21.0, count=6)
    network = {"pairs of nodes, nccl, 2 ranks per node": rate}
    for known, pair_checks in ({}, 0), (network, 1):
        SiteBaseline("", "r", "", {}, known).write(baseline_path(tmp_path / "site.yaml"))
        files = render_job(plan_of(tmp_path, config, {"partitions.0.max_nodes": 4}), BASE, tmp_path / "run").files
        steps = [step["command"] for step in json.loads(files["launch.json"])["steps"]]
        assert sum("fabric" in command for command in steps) == pair_checks
    assert json.loads(files["pair_check.json"])["baseline"]["network"] == network


def bindings(command: list[str]) -> list[str]:
    return [word for word in command if word.startswith(("--cpu-bind", "--gpu-bind", "--threads-per-core"))]


def test_only_the_training_step_is_bound(tmp_path: Path):
    masks = "mask_cpu:" + ",".join(["0xfe"] * 8)
    site = {"partitions.0.cpu_bind": masks, "partitions.0.gpu_bind": "none", "partitions.0.threads_per_core": 1}
    check, part = commands(tmp_path, site)
    assert bindings(part) == ["--threads-per-core=1", "--cpu-bind=none", "--gpu-bind=none"], "one GPU of eight"
    check, train = commands(tmp_path, site, config={"stages.0.gpus_per_node": 8})
    assert bindings(check) == ["--threads-per-core=1", "--cpu-bind=none"]
    assert bindings(train) == ["--threads-per-core=1", f"--cpu-bind={masks}", "--gpu-bind=none"]
    assert bindings(commands(tmp_path, site, JobId("fabric"))[0]) == ["--threads-per-core=1", "--cpu-bind=none"]
    assert [bindings(command) for command in commands(tmp_path, {})] == [[], []]


@pytest.mark.parametrize("prefix", ["", "v,", "verbose,", "q,", "quiet,"])
def test_masks_and_maps_are_for_whole_nodes(prefix: str, tmp_path: Path):
    binds = [f"{prefix}mask_cpu:0xfe,0xfe00", f"{prefix}map_gpu:7,6,5,4,3,2,1,0"]
    site = {"partitions.0.cpu_bind": binds[0], "partitions.0.gpu_bind": binds[1]}
    assert bindings(commands(tmp_path, site)[1]) == ["--cpu-bind=none", "--gpu-bind=none"], "one GPU of eight"
    whole = commands(tmp_path, site, config={"stages.0.gpus_per_node": 8})[1]
    assert bindings(whole) == [f"--cpu-bind={binds[0]}", f"--gpu-bind={binds[1]}"]
    closest = {"partitions.0.gpu_bind": f"{prefix}closest"}
    assert bindings(commands(tmp_path, closest)[1]) == [f"--gpu-bind={prefix}closest"]


def test_ranks_bind_themselves_with_cpu_bind_auto(tmp_path: Path):
    plan = plan_of(tmp_path, None, {"partitions.0.cpu_bind": "auto"})
    assert bindings(commands(tmp_path, {"partitions.0.cpu_bind": "auto"})[1]) == ["--cpu-bind=none"]
    job = job_spec(plan, JobId("train", ("base",)))
    assert isinstance(job, TrainSpec) and job.bind_cores


def test_container_gets_the_flag_of_the_accelerator_and_further_options(tmp_path: Path):
    software = {
        "kind": "container",
        "path": "/a.sif",
        "options": ["--no-home", "--env=A=b c"],
        "python": "/venv/bin/python",
    }

    def start(site: dict[str, Any]) -> list[str]:
        command = commands(tmp_path, {"software": software, **site})[1]
        return command[command.index("exec") + 1 : command.index("--bind")]

    assert start({}) == ["--nv", "--no-home", "--env=A=b c"]
    assert start({"accelerator": {"rocm": "6.4"}}) == ["--rocm", "--no-home", "--env=A=b c"]
    assert start({"accelerator": "cpu", "partitions.0.node.gpus": 0}) == ["--no-home", "--env=A=b c"]
    assert start({"software": {**software, "gpu_flag": False}}) == ["--no-home", "--env=A=b c"]
    command = commands(tmp_path, {"software": software})[1]
    assert command[command.index("/a.sif") + 1 :][:3] == ["/venv/bin/python", "-m", "longhaul"]


@pytest.mark.parametrize(
    ("job", "has_gpus"),
    [(BASE, True), (JobId("fabric"), True), (JobId("tokenizer"), False), (JobId("export", ("base",)), False)],
)
def test_only_steps_that_ask_for_gpus_get_the_flag_of_the_driver(job: JobId, has_gpus: bool, tmp_path: Path):
    """Without GPUs, Apptainer finds no driver, and prints warnings that look like the cause of a failure."""
    gpus = {**SITE["partitions"][0], "jobs": ["gpu", "debug"]}
    cores = {"jobs": ["cpu"], "name": "cpu", "max_minutes": 60, "node": {"cpus": 8, "memory_mb": 8000}}
    software = {"kind": "container", "path": "/a.sif"}
    command = commands(tmp_path, {"software": software, "partitions": [gpus, cores]}, job)[-1]
    assert ("--nv" in command) == has_gpus


@pytest.mark.parametrize(("name", "is_bound"), [("local", True), ("of,job", False), ("absent", False)])
def test_folder_for_temporary_files_is_bound_on_each_node(name: str, is_bound: bool, tmp_path: Path):
    (tmp_path / "bin").mkdir()
    path = fake_program(tmp_path / "bin", "apptainer", '#!/bin/sh\nprintf "%s\\n" "$@" "TMPDIR=$TMPDIR"\n')
    temporary = tmp_path / name
    if name != "absent":
        temporary.mkdir()
    config = {"storage.scratch": str(tmp_path / "scratch")}
    software = {"kind": "container", "path": "/a b.sif", "gpu_flag": False}
    command = commands(tmp_path, {"software": software}, JobId("tokenizer"), config)[0]
    start = command[command.index("bash") :]
    environment = {**os.environ, "PATH": path, "TMPDIR": str(temporary)}
    shown = subprocess.run(start, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert (tmp_path / "scratch").is_dir() and "/a b.sif" in shown
    bind = ["--bind", str(temporary)] if is_bound else ["--bind", "/dev/shm"]
    assert shown[:3] == ["exec", *bind] and shown.count(str(temporary)) == is_bound
    assert shown[-1] == f"TMPDIR={temporary if is_bound else '/tmp'}"


PYXIS = {
    "kind": "srun",
    "options": ["--container-image=nvcr.io#nvidia/pytorch:26.01-py3"],
    "binds": ["/a:/b", "/c"],
}
ENTER_SCRIPT = f"{REPOSITORY}/templates/sbatch/enter_srun_container.sh"


def test_srun_starts_a_pyxis_container_with_all_folders_and_variables_of_the_job(tmp_path: Path):
    """Without --container-env, pyxis keeps a variable of the image (README of pyxis 0.24)."""
    run = tmp_path / "run"
    command = commands(tmp_path, {"software": PYXIS, "environment": {"NCCL_IB_HCA": "mlx5_1"}})[1]
    start = command.index("--container-image=nvcr.io#nvidia/pytorch:26.01-py3")
    assert command[0] == "srun"
    assert command[start + 1] == f"--container-mounts={REPOSITORY}:{REPOSITORY},{run}:{run},/c:/c,/a:/b"
    option, _, names = command[start + 2].partition("=")
    assert option == "--container-env" and {"NCCL_IB_HCA", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"} <= {*names.split(",")}
    assert "PYTORCH_ALLOC_CONF" not in names, "what the job leaves alone if it is set is the image's"
    assert command[start + 3 : start + 8] == ["bash", ENTER_SCRIPT, str(run), str(PACKAGE.parent), "--"]
    assert command[start + 8] == "python3"


def test_folder_inside_of_a_bind_is_made_in_the_container(tmp_path: Path):
    """A local disk is the same folder on all nodes, and longhaul's folder on it is on none of them before the first job."""
    config = {"storage.scratch": "/local/me/longhaul", "storage.weights": str(tmp_path / "weights")}
    software = {**PYXIS, "binds": ["/local"]}
    command = commands(tmp_path, {"software": software}, BASE, config)[-1]
    (mounts,) = (word for word in command if word.startswith("--container-mounts="))
    assert "/local:/local" in mounts and "/local/me" not in mounts
    start = command.index(ENTER_SCRIPT)
    assert command[start + 3 : command.index("--", start)] == [str(tmp_path / "weights"), "/local/me/longhaul"]


def test_folders_that_pyxis_mounts_are_created_before_the_first_job_or_others_are_named(tmp_path: Path):
    config = {"storage.weights": str(tmp_path / "a/weights"), "storage.data": str(tmp_path / "a/data")}
    write_launch_files(plan_of(tmp_path, config, {"software": {"kind": "container", "path": "/a.sif"}}), tmp_path)
    assert not (tmp_path / "a").exists(), "Apptainer's start script makes them on the nodes"
    plan = plan_of(tmp_path, config, {"software": PYXIS})
    write_launch_files(plan, tmp_path)
    assert (tmp_path / "a/weights").is_dir() and (tmp_path / "a/data").is_dir()
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match=r"storage: .*weights cannot be created: Not a directory"):
        write_launch_files(plan, tmp_path)
    own = {key: folder.replace("/a/", "/own/") for key, folder in config.items()}
    write_launch_files(plan_of(tmp_path, own, {"software": PYXIS}), tmp_path)
    assert (tmp_path / "own/weights").is_dir()


def enter_srun_container(run: Path, *command: str, **environment: str) -> str:
    """Return what a command prints that a step starts in run, in a container of srun; `srun` and its options are left out."""
    plan = plan_of(run.parent, None, {"software": {"kind": "srun", "options": ["--environment=/images/job.toml"]}})
    rendered_for = run.parent / "run"
    words = json.loads(render_job(plan, JobId("fabric"), rendered_for).files["launch.json"])["steps"][0]["command"]
    words = [str(run) if word == str(rendered_for) else word for word in words]
    inner = words[words.index("--environment=/images/job.toml") + 1 : words.index("python3")]
    assert inner[0] == "bash"
    done = subprocess.run(
        [*inner, *command], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout


def test_step_in_an_srun_container_starts_in_the_working_folder_with_longhaul_on_its_path(tmp_path: Path):
    """Images choose their own working folder, and may set PYTHONPATH."""
    run = tmp_path / "a b'c"
    run.mkdir()
    shown = enter_srun_container(run, "bash", "-c", 'echo "$PWD|$PYTHONPATH"', PYTHONPATH="/of/the/image")
    assert shown == f"{run}|{PACKAGE.parent}\n"


@pytest.mark.parametrize(("name", "is_kept"), [("local", True), ("absent", False)])
def test_step_in_an_srun_container_has_a_folder_for_temporary_files(name: str, is_kept: bool, tmp_path: Path):
    """enroot mounts a /tmp of its own, and not $TMPDIR of the host. MIOpen's folders are below it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "local").mkdir()
    folder = f"{tmp_path}/{name}"
    shown = enter_srun_container(
        tmp_path / "run",
        "bash",
        "-c",
        'echo "$TMPDIR $MIOPEN_USER_DB_PATH $MIOPEN_CUSTOM_CACHE_DIR"',
        TMPDIR=folder,
        MIOPEN_USER_DB_PATH=f"{folder}/miopen-41",
        MIOPEN_CUSTOM_CACHE_DIR="/of/the/user",
    )
    place = folder if is_kept else "/tmp"
    assert shown == f"{place} {place}/miopen-41 /of/the/user\n"


def test_modules_are_loaded_after_purge_and_use(tmp_path: Path):
    software = {"module_purge": True, "module_use": ["/apps/a b"], "modules": ["gcc/13", "cuda"]}
    launch = render_job(plan_of(tmp_path, None, {"software": software}), JobId("fabric"), tmp_path).files["launch.sh"]
    lines = [line for line in launch.splitlines() if line.startswith("module ")]
    assert lines == ["module purge", "module use '/apps/a b'", "module load gcc/13", "module load cuda"]


def test_rocm_jobs_have_their_own_miopen_folder_and_no_variable_of_cuda(tmp_path: Path):
    def launch(accelerator: dict[str, str]) -> str:
        plan = plan_of(tmp_path, None, {"accelerator": accelerator})
        return render_job(plan, JobId("train", ("base",)), tmp_path).files["launch.sh"]

    amd, nvidia = launch({"rocm": "6.4"}), launch({"cuda": "13.0"})
    assert "MIOPEN" not in nvidia and "PYTORCH_ALLOC_CONF" in nvidia
    assert "PYTORCH_ALLOC_CONF" not in amd
    lines = "\n".join(line for line in amd.splitlines() if "MIOPEN" in line)
    shown = subprocess.run(
        ["bash", "-c", f'{lines}\necho "$MIOPEN_USER_DB_PATH $MIOPEN_CUSTOM_CACHE_DIR"'],
        capture_output=True,
        text=True,
        check=True,
        env={"TMPDIR": "/local", "SLURM_JOB_ID": "41"},
    )
    folder = f"/local/longhaul-miopen-{os.getuid()}-41"
    assert shown.stdout == f"{folder} {folder}\n"


def test_controller_is_not_rendered_where_it_would_occupy_a_gpu_node(tmp_path: Path):
    cores = {"jobs": ["login"], "name": "cpu", "max_minutes": 60, "node": {"cpus": 8, "memory_mb": 8000}}
    partition = {**SITE["partitions"][0], "exclusive": True}
    for partitions, expected in (([partition], False), ([partition, cores], True), (SITE["partitions"], True)):
        plan = plan_of(tmp_path, None, {"partitions": partitions})
        assert (plan.paths.folder in render_run(plan, tmp_path)) == expected


def test_address_of_rank_0_is_passed_to_the_supervisor(tmp_path: Path):
    plan = plan_of(tmp_path, None, {"interconnect": {"master_address": {"suffix": "i"}}})
    spec = json.loads(render_job(plan, JobId("train", ("base",)), tmp_path).files["launch.json"])
    assert (spec["master_suffix"], spec["master_interface"]) == ("i", None)


@pytest.mark.parametrize(("refusals", "cancelled"), [(0, "7"), (2, "7"), (4, "")])
def test_the_controller_runs_although_sbatch_refuses_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int, cancelled: str
):
    """slurmctld may be restarting. The script ended before the main process had begun."""
    scripts = {
        "sbatch": f'echo >> calls; [ "$(wc -l < calls)" -gt {refusals} ] && echo 7',
        "sleep": "",
        "scancel": 'echo "$1" > cancelled',
        "main": "touch ran",
    }
    path = ""
    for name, lines in scripts.items():
        path = fake_program(tmp_path, name, f"#!/bin/bash\n{lines}\n")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/main"))
    (script,) = render_controller(plan_of(tmp_path), tmp_path).files.values()
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path, "SLURM_JOB_ID": "6"},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and (tmp_path / "ran").exists(), done.stderr
    found = (tmp_path / "cancelled").read_text().strip() if (tmp_path / "cancelled").exists() else ""
    assert found == cancelled
    assert ("sbatch refused the successor of this job" in done.stderr) == (not cancelled)
