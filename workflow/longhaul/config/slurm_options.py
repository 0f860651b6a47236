"""Lists the options of sbatch and srun that `sbatch_extra` and `srun_extra` of a site file must not set, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SET_BY_LONGHAUL = "longhaul sets itself; remove it"
_SIZE = "follows from the plan and from node of the partition; remove it"
_NO_JOB = "makes sbatch or srun start no job; remove it"
_FIXED_NODES = "leaves no replacement for a node that fails; use the key constraint or reservation of the partition"


def _key(name: str, place: str = "partition") -> str:
    return f"the key {name} of the {place} sets; use that key"


# Option -> what completes the sentence "sbatch_extra contains OPTION, which …".
_OF_JOBS_AND_STEPS = {
    **dict.fromkeys(
        ("--chdir", "--error", "--export", "--export-file", "--input", "--output", "--workdir"), SET_BY_LONGHAUL
    ),
    **dict.fromkeys(("--gid", "--uid"), "is for administrators; remove it"),
    **dict.fromkeys(("--nodes", "--ntasks", "--ntasks-per-core", "--ntasks-per-gpu", "--ntasks-per-node"), _SIZE),
    **dict.fromkeys(("--ntasks-per-socket", "--ntasks-per-tres", "--tasks-per-node", "--tres-per-task"), _SIZE),
    **dict.fromkeys(("--cpus-per-gpu", "--cpus-per-task", "--overcommit"), _SIZE),
    **dict.fromkeys(("--autocomplete", "--help", "--test-only", "--usage", "--version"), _NO_JOB),
    **dict.fromkeys(("--nodelist", "--nodefile"), _FIXED_NODES),
    **dict.fromkeys(("--gpus", "--gpus-per-node", "--gpus-per-socket", "--gpus-per-task"), _key("gpu_request")),
    **dict.fromkeys(("--gpu-bind", "--tres-bind"), _key("gpu_bind")),
    **dict.fromkeys(("--container", "--container-id"), _key("software", "site")),
    "--cpu-bind": _key("cpu_bind"),
    "--distribution": "changes which ranks are on one node; remove it",
    "--exclude": "longhaul sets itself from results/quarantine.json; remove it",
    "--gres": _key("gpu_request or gres_extra"),
    "--threads-per-core": _key("threads_per_core"),
}
# Options of pyxis and of CSCS. With sbatch they start longhaul's supervisor in the container, where Slurm's commands are absent.
_CONTAINERS = dict.fromkeys(
    ("--container-image", "--container-mounts", "--container-name", "--container-workdir", "--environment"),
    "starts a container without longhaul's folders; write software: {kind: srun, options: […]} instead",
)
RESERVED_SRUN_OPTIONS = _OF_JOBS_AND_STEPS | {
    **dict.fromkeys(("--jobid", "--kill-on-bad-exit", "--label", "--no-allocate", "--wait"), SET_BY_LONGHAUL),
    **dict.fromkeys(("--multi-prog", "--relative"), _SIZE),
    **dict.fromkeys(("--pty", "--unbuffered"), "writes terminal codes into the logs; remove it"),
    "--time": "ends a job before its allocation ends; remove it",
}
RESERVED_SRUN_EXTRA = RESERVED_SRUN_OPTIONS | _CONTAINERS
"""Options that `srun_extra` must not set. `software.options` may choose the container."""
RESERVED_SBATCH_OPTIONS = _OF_JOBS_AND_STEPS | {
    **_CONTAINERS,
    **dict.fromkeys(("--comment", "--job-name", "--open-mode", "--parsable", "--quiet", "--wrap"), SET_BY_LONGHAUL),
    **dict.fromkeys(("--array", "--external"), "makes another kind of job, without longhaul's supervisor; remove it"),
    **dict.fromkeys(
        ("--clusters", "--cluster-constraint"), "sends jobs to clusters that longhaul does not ask; remove it"
    ),
    **dict.fromkeys(("--mem", "--mem-per-cpu", "--mem-per-gpu"), _key("memory or node.memory_mb")),
    **dict.fromkeys(("--requeue", "--no-requeue"), _key("requeue", "site")),
    "--account": _key("account"),
    "--constraint": _key("constraint"),
    "--dependency": "longhaul sets itself, from the order of the jobs; remove it",
    "--exclusive": _key("exclusive"),
    "--hold": "lets each job wait until somebody releases it; remove it",
    "--partition": _key("name"),
    "--qos": _key("qos"),
    "--reservation": _key("reservation"),
    "--time": "the key max_minutes of the partition limits and minutes of a stage sets; use these keys",
    "--wait": "keeps sbatch waiting until the job ends; remove it",
    "--time-min": "lets Slurm shorten a job below what the plan needs; remove it",
}


def is_option(given: str, known: str) -> bool:
    """Return whether `given`, with or without a value, is this option. sbatch and srun accept the beginning of a name, too."""
    return known.startswith(given.partition("=")[0])


def check_options(key: str, options: Iterable[str], reserved: Mapping[str, str]) -> None:
    """Check the options that a site file lists below `key`.

    reserved: option -> the reason and what to do instead, after "which"

    Raises:
        ValueError: an option is reserved, or listed twice.
    """
    seen: set[str] = set()
    for option in options:
        name = option.partition("=")[0]
        if found := next((known for known in sorted(reserved) if is_option(option, known)), None):
            also = "" if found == name else f" ({found})"
            raise ValueError(f"{key} contains {name}{also}, which {reserved[found]}")
        if name in seen:
            raise ValueError(f"{key} contains {name} twice; remove one of them")
        seen.add(name)
