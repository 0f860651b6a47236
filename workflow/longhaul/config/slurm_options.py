"""Lists the options of sbatch and srun that `sbatch_extra` and `srun_extra` of a site file must not set."""

from __future__ import annotations

from collections.abc import Iterable

# Options that give a step or a job another size, another identity, other output or no output at all.
_RESERVED = {
    "--chdir",
    "--cpus-per-gpu",
    "--cpus-per-task",
    "--distribution",
    "--error",
    "--export",
    "--export-file",
    "--gid",
    "--gpus",
    "--gpus-per-node",
    "--gpus-per-socket",
    "--gpus-per-task",
    "--gres",
    "--help",
    "--input",
    "--nodes",
    "--ntasks",
    "--ntasks-per-gpu",
    "--ntasks-per-node",
    "--output",
    "--test-only",
    "--threads-per-core",
    "--uid",
    "--usage",
    "--version",
    "--wait",
}
RESERVED_SRUN_OPTIONS = _RESERVED | {
    "--cpu-bind",
    "--gpu-bind",
    "--jobid",
    "--kill-on-bad-exit",
    "--multi-prog",
    "--no-allocate",
    "--nodelist",
    "--pty",
}
RESERVED_SBATCH_OPTIONS = _RESERVED | {
    "--account",
    "--array",
    "--clusters",
    "--comment",
    "--constraint",
    "--dependency",
    "--exclude",
    "--exclusive",
    "--job-name",
    "--mem",
    "--mem-per-cpu",
    "--mem-per-gpu",
    "--no-requeue",
    "--open-mode",
    "--parsable",
    "--partition",
    "--qos",
    "--quiet",
    "--requeue",
    "--reservation",
    "--time",
    "--time-min",
    "--tres-per-task",
    "--wrap",
}


def check_options(key: str, options: Iterable[str], reserved: Iterable[str]) -> None:
    """Check the options that a site file lists below `key`.

    Raises:
        ValueError: an option is reserved, or listed twice.
    """
    seen: set[str] = set()
    for option in options:
        name = option.partition("=")[0]
        # sbatch and srun also accept the beginning of an option's name.
        if found := next((known for known in sorted(reserved) if known.startswith(name)), None):
            also = "" if found == name else f" ({found})"
            raise ValueError(f"{key} contains {name}{also}, which longhaul sets itself; remove it")
        if name in seen:
            raise ValueError(f"{key} contains {name} twice; remove one of them")
        seen.add(name)
