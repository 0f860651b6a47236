"""Config -> Plan, without running anything."""

from longhaul.plan.model import Plan, StagePlan, lock_path, make_plan
from longhaul.plan.requests import partition_for
from longhaul.plan.sources import dataset_files, evaluation_files, model_config

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
