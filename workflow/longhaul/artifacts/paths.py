"""Spells every job name and every path below results/ (job folders, weights folders, logs, artifacts); no other module does.
Hashes in names are computed elsewhere.

Paths are relative to the working folder (`snakemake --directory`), in which every job starts. The rules spell the same
paths in their input, output, log and benchmark lines, as Snakemake needs wildcards there; a test compares both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path("results")
QUARANTINE = RESULTS / "quarantine.json"
_LEASE = ".lease.json"
CODE_LINK = RESULTS / ".code" / "longhaul"
"""Link to an installed package. Jobs have its folder on PYTHONPATH, because site-packages would add other packages, too."""
STAGE_KIND = "train"
"""The job kind whose jobs have their folder below stages/ instead of jobs/."""
SERVE_KIND = "serve"
"""The job kind of servers, which `longhaul serve` starts."""


@dataclass(frozen=True)
class JobId:
    """The name of one job of a run: its kind, and what distinguishes it from other jobs of that kind.

    JobId("environment"), JobId("train", ("pretrain",)), JobId("encode", ("web", "3")).
    """

    kind: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the name that users see, `train-pretrain`; it is also the name of the job's folder."""
        return "-".join((self.kind, *self.names))


@dataclass(frozen=True)
class JobFolder:
    """The files of one job: what it is started with, and how it stands."""

    path: Path

    def working_folder(self) -> Path:
        """Return the folder that holds `results/`. Relative paths in the files of a job are relative to it."""
        return self.path.parents[3]

    @property
    def launch_script(self) -> Path:
        return self.path / "launch.sh"

    @property
    def launch_spec(self) -> Path:
        """The launch spec: the supervisor reads it."""
        return self.path / "launch.json"

    @property
    def job_spec(self) -> Path:
        """The job spec: the job's own processes read it."""
        return self.path / "job.json"

    @property
    def sbatch_script(self) -> Path:
        return self.path / "job.sbatch"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def failure(self) -> Path:
        return self.path / "failure.json"

    @property
    def server_lock(self) -> Path:
        """File that the process of a local server locks until it ends; it holds its owner."""
        return self.path / "server.lock"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def deadline(self) -> Path:
        return self.path / "deadline.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def node_results(self) -> Path:
        """Results of checks, one line per check and node; only a job that checks nodes has this file."""
        return self.path / "node_results.jsonl"

    @property
    def nccl_tests(self) -> Path:
        """Report of the programs of nccl-tests; only the fabric check of a site that names them has this file."""
        return self.path / "nccl_tests.json"

    @property
    def nccl_tests_spec(self) -> Path:
        """The spec of the step that runs them."""
        return self.path / "nccl_tests_job.json"

    def nccl_tests_output(self, program: str) -> Path:
        """Output of one of these programs."""
        return self.path / "nccl_tests" / f"{program}.txt"

    @property
    def rank_failures(self) -> Path:
        """Folder of the files in which failing ranks say why they failed."""
        return self.path / "failures"

    def rank_failure(self, rank: int) -> Path:
        return self.rank_failures / f"rank-{rank:05d}.json"

    def missed_heartbeat(self, noticed_by: int) -> Path:
        """The file in which a rank records that another rank stopped sending heartbeats."""
        return self.rank_failures / f"heartbeat-{noticed_by:05d}.json"

    @property
    def discarded_weights(self) -> Path:
        """Folder of a scale test's short training; it is deleted after the steps."""
        return self.path / "discarded"

    # A serving job's folder holds these, too.

    @property
    def endpoint(self) -> Path:
        """The file with the address at which the served model answers."""
        return self.path / "endpoint.json"

    @property
    def api_key(self) -> Path:
        """The API key, which only its owner can read."""
        return self.path / "api_key.yaml"

    # A training stage's folder holds these, too.

    @property
    def result_spec(self) -> Path:
        return self.path / "result_spec.json"

    @property
    def deepspeed_config(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def node_check_spec(self) -> Path:
        """Job spec of the environment check on the nodes that the stage was given."""
        return self.path / "node_check.json"

    @property
    def node_check_report(self) -> Path:
        return self.path / "nodes.json"

    @property
    def pair_check_spec(self) -> Path:
        """Job spec of the pair tournament between the nodes that the stage was given."""
        return self.path / "pair_check.json"

    @property
    def pair_check_report(self) -> Path:
        return self.path / "pairs.json"

    @property
    def checkpoint(self) -> Path:
        """The stage's artifact: which checkpoints it ended with."""
        return self.path / "checkpoint.json"

    @property
    def weights(self) -> Path:
        """Root of the weights folders, unless the config's storage.weights names another place."""
        return self.path / "weights"


@dataclass(frozen=True)
class WeightsFolder:
    """The folder of a stage's checkpoints: <root>/<hash of all that the weights depend on>."""

    path: Path

    @property
    def identity(self) -> Path:
        return self.path / "identity.json"

    @property
    def model_config(self) -> Path:
        return self.path / "model_config.json"

    @property
    def generation_config(self) -> Path:
        """The pretrained model's generation_config.json, where it has one."""
        return self.path / "pretrained_generation.json"

    def exported_configs(self) -> list[Path]:
        """Return those of these two files that exist: an export copies them."""
        return [path for path in (self.model_config, self.generation_config) if path.is_file()]

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def tracker_runs(self) -> Path:
        return self.path / "trackers.json"

    @property
    def skipped_batches(self) -> Path:
        return self.path / "skipped.json"

    @property
    def lease(self) -> Path:
        return self.path / "lease.json"

    @property
    def lease_beat(self) -> Path:
        return self.path / "lease.beat"

    @property
    def samples(self) -> Path:
        """Packs of the stage's samples, and their sizes."""
        return self.path / "samples"

    @property
    def verified_data(self) -> Path:
        """A hash over sizes, times and recorded hashes of the shards that this stage has verified."""
        return self.path / "verified_data"

    @property
    def profiles(self) -> Path:
        """Folder of what `profile_steps` measured."""
        return self.path / "profile"

    def profile(self, rank: int) -> Path:
        """The kernel times of a rank."""
        return self.profiles / f"rank-{rank:05d}.json"

    def written_profiles(self) -> list[Path]:
        """Return the kernel times of all ranks that have some, in the order of the ranks."""
        return sorted(self.profiles.glob("rank-?????.json"))

    def profile_trace(self, rank: int) -> Path:
        """The Chrome trace of a rank."""
        return self.profiles / f"rank-{rank:05d}.trace.json.gz"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> WeightsFolder:
        """Return the weights folder that holds a checkpoint's folder."""
        return cls(checkpoint.parents[1])

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    @staticmethod
    def newest_step(weights_root: Path) -> int:
        """Return the newest step of which any weights folder below the root holds a complete checkpoint, else 0."""
        manifests = weights_root.glob("*/checkpoints/step-????????/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in manifests), default=0)


@dataclass(frozen=True)
class AttemptLogs:
    """The folder of what a job's processes print: attempt-0001.log, attempt-0002.log, …; no attempt overwrites another's."""

    path: Path

    def log(self, attempt: int) -> Path:
        return self.path / f"attempt-{attempt:04d}.log"

    def logs(self) -> list[Path]:
        """Return the logs that exist, the oldest first."""
        return sorted(self.path.glob("attempt-*.log"), key=self._number)

    def next_number(self) -> int:
        return self._number(logs[-1]) + 1 if (logs := self.logs()) else 1

    @staticmethod
    def collective_record_prefix(log: Path) -> str:
        """Beginning of the names of the files in which each rank's last collectives are written; the rank follows."""
        return f"{log.with_suffix('')}-collectives-rank-"

    @staticmethod
    def collective_records(log: Path) -> dict[int, Path]:
        """Return rank -> the file of its last collectives, in the order of the ranks, for those that exist."""
        prefix = AttemptLogs.collective_record_prefix(log)
        ranks = (path.name.removeprefix(Path(prefix).name) for path in log.parent.glob(f"{Path(prefix).name}*"))
        return {rank: Path(f"{prefix}{rank}") for rank in sorted(int(rank) for rank in ranks if rank.isdecimal())}

    @staticmethod
    def _number(log: Path) -> int:
        number = log.stem.removeprefix("attempt-")
        return int(number) if number.isdecimal() else 0


@dataclass(frozen=True)
class RunPaths:
    """The paths of one run. `results` is the results folder; a process with another working folder names it."""

    run: str
    results: Path = RESULTS

    @property
    def folder(self) -> Path:
        return self.results / self.run

    @property
    def lock(self) -> Path:
        """The lock that fetch writes: hub revisions, files, the pretrained model's sizes."""
        return self.results / f"{self.run}.lock.json"

    @property
    def lease(self) -> Path:
        """The lease of the main Snakemake process that owns the run."""
        return self.results / f"{self.run}{_LEASE}"

    @classmethod
    def with_lease(cls) -> list[RunPaths]:
        """Return the paths of the runs in the results folder that have a lease."""
        return [cls(path.name.removesuffix(_LEASE)) for path in RESULTS.glob(f"*{_LEASE}")]

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def jobs_to_run(self) -> Path:
        """The jobs that the main process has yet to run."""
        return self.folder / "jobs_to_run.json"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.folder / "environment.json"

    @property
    def fabric(self) -> Path:
        return self.folder / "fabric.json"

    def scale_test(self, nodes: int) -> Path:
        """The report of a short training on this number of nodes."""
        return self.folder / "scale_test" / f"{nodes}.json"

    def scale_tests(self) -> list[Path]:
        """Return the reports of all short trainings that exist, also of those that missed a limit, from the fewest nodes."""
        found = (self.folder / "scale_test").glob("*.json")
        return sorted(found, key=lambda path: (int(path.name.partition(".")[0]), path.name))

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def tokenizers(self) -> Path:
        return self.folder / "tokenizers"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def controller_script(self) -> Path:
        return self.folder / "controller.sbatch"

    @property
    def controller_log(self) -> Path:
        return self.logs / "controller.log"

    @property
    def fetched(self) -> Path:
        """Files that fetch made itself: streamed splits, the demo's text."""
        return self.folder / "fetched"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def log(self, job: JobId) -> Path:
        return self._per_rule("logs", job, "log")

    def attempt_logs(self, job: JobId) -> AttemptLogs:
        return AttemptLogs(self.log(job).with_suffix(""))

    def benchmark(self, job: JobId) -> Path:
        """Snakemake's record of how long the job ran."""
        return self._per_rule("benchmarks", job, "tsv")

    def _per_rule(self, folder: str, job: JobId, ending: str) -> Path:
        return (
            self.folder / folder / f"{'/'.join((job.kind, '-'.join(job.names)) if job.names else (job.kind,))}.{ending}"
        )

    def job(self, job: JobId) -> JobFolder:
        """Return the folder of a job's launch files and records."""
        if job.kind == STAGE_KIND:
            return self.stage("-".join(job.names))
        return JobFolder(self.folder / "jobs" / str(job))

    def stage(self, name: str) -> JobFolder:
        return JobFolder(self.folder / "stages" / name)

    def job_folders(self) -> Iterator[JobFolder]:
        """Yield the folders of all jobs that have been rendered, in the order of their names."""
        for kind in ("jobs", "stages"):
            yield from map(JobFolder, sorted((self.folder / kind).glob("*/")))

    def manifest(self, dataset: str) -> Path:
        return self.folder / "data" / f"{dataset}.json"

    def source_index(self, dataset: str) -> Path:
        return self.folder / "data" / f"{dataset}.sources.json"

    def encoded_partition(self, dataset: str, partition: int, partitions: int) -> Path:
        return self.folder / "data" / f"{dataset}.encoded-{partition}-of-{partitions}.json"

    def conversation_counts(self, dataset: str) -> Path:
        """Counts of a dataset's conversations that the run's sft stages keep after truncation."""
        return self.folder / "data" / f"{dataset}.kept.json"

    def shards(self, dataset: str) -> Path:
        """Folder of a dataset's shards, unless the config's storage.data names another place."""
        return self.folder / "data" / dataset

    def exports(self, stage: str) -> Path:
        """The folder of all exports of a stage; each is named by its weights, their step and its precision."""
        return self.folder / "export" / stage

    def export(self, stage: str) -> Path:
        """The link to the newest exported Hugging Face folder."""
        return latest_export(self.exports(stage))

    def export_manifest(self, stage: str) -> Path:
        return self.folder / "export" / f"{stage}.json"

    def export_manifests(self) -> list[Path]:
        """Return the manifests of all exports that exist."""
        return sorted((self.folder / "export").glob("*.json"))

    def evaluation(self, stage: str, model: str, task: str) -> Path:
        """The results of one task. model: trained, or start for the model that the stage starts from."""
        return self.folder / "evaluation" / stage / model / f"{task}.json"

    def evaluations(self) -> list[Path]:
        """Return the results of all tasks that exist."""
        return sorted((self.folder / "evaluation").glob("*/*/*.json"))

    def task_data(self, stage: str, task: str) -> Path:
        """The lock of the data that an evaluation task loads from the Hub. The data are in the folder of its name beside it."""
        return self.folder / "task_data" / stage / f"{task}.json"

    def task_data_locks(self, stage: str) -> list[Path]:
        """Return those of all tasks of a stage that exist."""
        return sorted((self.folder / "task_data" / stage).glob("*.json"))

    def task_data_log(self, stage: str, task: str) -> Path:
        """Log of fetching the data of an evaluation task. Each stage has a folder, because both names may have hyphens."""
        return self.logs / "fetch_task_data" / stage / f"{task}.log"

    def serve_check(self, stage: str) -> Path:
        """The result of the check of a server of a stage's export."""
        return self.folder / "serve_check" / f"{stage}.json"

    def serve_checks(self) -> list[Path]:
        """Return the results of all these checks that exist."""
        return sorted((self.folder / "serve_check").glob("*.json"))


def latest_export(exports: Path) -> Path:
    """Return the link to the newest of a stage's exports."""
    return exports / "latest"


def run_of(job_folder: Path) -> RunPaths:
    """Return the paths of the run that a job's folder (results/<run>/jobs/<job> or results/<run>/stages/<stage>) is of."""
    run = job_folder.parents[1]
    return RunPaths(run.name, run.parent)


def job_of(job_folder: Path) -> str:
    """Return the job's name: train-<stage> below stages/, else the folder's own name."""
    is_stage = job_folder.parent.name == "stages"
    return str(JobId(STAGE_KIND, (job_folder.name,))) if is_stage else job_folder.name
