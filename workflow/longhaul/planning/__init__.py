"""The plan of a run, computed from its config without running anything."""

from longhaul.planning.input_files import dataset_files, evaluation_files, left_out_files, model_config
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
