"""Reasons of waiting jobs: which never pass by themselves, and what to do about them."""

from __future__ import annotations

import pytest

from longhaul.jobs.slurm_reasons import never_starts, remedy_of

WAITS_FOR_EVER = (
    "AccountNotAllowed QOSNotAllowed InvalidQOS PartitionTimeLimit PartitionConfig BadConstraints QOSMaxNodePerJobLimit "
    "QOSMaxWallDurationPerJobLimit AssocMaxCpuPerNode QOSMinGRES AssocGrpCPUMinutesLimit AssocGrpBillingMinutes "
    "QOSGrpNodeMinutes QOSGrpWallLimit AssocMaxCpuMinutesPerJobLimit MaxMemPerLimit DependencyNeverSatisfied JobHeldUser "
    "JobHoldMaxRequeue launch_failed_requeued_held ReservationDeleted"
)
STARTS_LATER = (
    "None Priority Resources Dependency BeginTime Licenses PartitionDown ReqNodeNotAvail Reservation QOSMaxJobsPerUserLimit "
    "QOSMaxNodePerUserLimit QOSGrpNodeLimit AssocGrpCPURunMinutesLimit AssocGrpGRESRunMinutes AssocGrpNodeLimit "
    "AssocMaxJobsLimit MaxGRESPerAccount MaxNodeRunMinsPerUser JobArrayTaskLimit MaxPoweredUpNodes"
)


@pytest.mark.parametrize("reason", WAITS_FOR_EVER.split())
def test_reason_that_does_not_pass_by_itself_has_a_remedy(reason: str):
    assert never_starts(reason) and remedy_of(reason)


@pytest.mark.parametrize("reason", STARTS_LATER.split())
def test_reason_that_passes_when_other_jobs_end(reason: str):
    assert not never_starts(reason)


@pytest.mark.parametrize(
    ("reason", "key"),
    [
        ("PartitionTimeLimit", "max_minutes"),
        ("PartitionNodeLimit", "node, max_nodes or name"),
        ("PartitionConfig", "name"),
        ("BadConstraints", "constraint"),
        ("ReservationDeleted", "reservation"),
        ("AssocMaxNodePerJobLimit", "account, max_nodes"),
    ],
)
def test_remedy_names_the_key_of_the_site_file(reason: str, key: str):
    assert remedy_of(reason).startswith(f"correct {key}")


def test_remedy_of_a_used_budget_or_a_held_job_names_no_key():
    assert remedy_of("AssocGrpBillingMinutes").startswith("the budget of the account or QOS")
    assert "scontrol release" in remedy_of("launch_failed_requeued_held")
