"""Plan of a run: steps, layouts, memory, Slurm requests and DeepSpeed config, computed and checked before submission."""

from longhaul.planning.check_files_exist import dataset_files, evaluation_files, left_out_files, model_config
from longhaul.planning.plan import Plan, StagePlan, build_plan

__all__ = [
    "Plan",
    "StagePlan",
    "build_plan",
    "dataset_files",
    "evaluation_files",
    "left_out_files",
    "model_config",
]
