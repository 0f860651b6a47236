"""Config -> Plan, without running anything."""

from longhaul.planning.allocations import partition_for
from longhaul.planning.input_files import dataset_files, evaluation_files, model_config
from longhaul.planning.plan import Plan, StagePlan, lock_path, make_plan

__all__ = [
    "Plan",
    "StagePlan",
    "dataset_files",
    "evaluation_files",
    "lock_path",
    "make_plan",
    "model_config",
    "partition_for",
]
