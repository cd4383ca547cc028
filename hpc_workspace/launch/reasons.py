"""Why a job waits, and why it ended, in English. Slurm's own word always stands beside it.

Source: squeue(1) of Slurm 24.11, JOB REASON CODES and JOB STATE CODES; for what begins with Assoc and QOS Slurm's page
on resource limits.
"""

from __future__ import annotations

import pwd
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a job is pending.

    Attributes:
        text: in English; empty where the word says nothing that we know.
        remedy: what to do; empty if waiting is enough.
    """

    text: str
    remedy: str = ""

    @property
    def never_resolves(self) -> bool:
        """Whether the job will not start however long it waits."""
        return bool(self.remedy)


_CANCEL = "Cancel it and submit another."
_REASONS = {
    "Resources": Reason("waits for free resources"),
    "Priority": Reason("other jobs come first"),
    "Dependency": Reason("waits for a job that it depends on"),
    "DependencyNeverSatisfied": Reason("the job that it depends on failed", _CANCEL),
    "BeginTime": Reason("its begin time has not come"),
    "Cleaning": Reason("its earlier life is being cleared away"),
    "Prolog": Reason("the node is being prepared"),
    "JobHeldUser": Reason("it is held", "scontrol release JOB lets it go."),
    "JobHeldAdmin": Reason("it is held by an administrator", "Ask them, or see `scontrol show job`."),
    "JobArrayTaskLimit": Reason("its array may not run more tasks at once"),
    "Licenses": Reason("waits for a licence"),
    "NodeDown": Reason("a node that it needs is down"),
    "NodeNotAvail": Reason("a node that it needs is not available"),
    "ReqNodeNotAvail": Reason("a node that it asks for is down, drained or reserved"),
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions": Reason(
        "the nodes that it could use are down, drained or reserved"
    ),
    "PartitionDown": Reason("its partition is down"),
    "PartitionInactive": Reason("its partition starts no jobs at present"),
    "PartitionConfig": Reason("it asks for what its partition does not have", "Ask for less, or another partition."),
    "PartitionNodeLimit": Reason("it asks for more nodes than its partition allows", "Choose another partition."),
    "PartitionTimeLimit": Reason(
        "its time limit is above its partition's", "Ask for less time, or choose another partition (`sinfo -s`)."
    ),
    "BadConstraints": Reason("no node fits what it asks for", "Change constraint, gres, mem or nodelist."),
    "AccountNotAllowed": Reason("its account may not use this partition", "Choose another account or partition."),
    "QOSNotAllowed": Reason("its QOS may not be used here", "Choose another qos."),
    "InvalidAccount": Reason("its account does not exist", "Set SlurmOptions(account=…)."),
    "InvalidQOS": Reason("its QOS does not exist", "Set SlurmOptions(qos=…)."),
    "Reservation": Reason("its reservation has not begun"),
    "ReservationDeleted": Reason("its reservation is gone", _CANCEL),
    "SystemFailure": Reason("Slurm or the file system failed"),
    "JobLaunchFailure": Reason("it could not be started", "See `scontrol show job`; a node may be broken."),
    "launch failed requeued held": Reason("it could not be started, and is held", "scontrol release JOB tries again."),
}
# AssocMaxWallDurationPerJobLimit, QOSMaxCpuPerJobLimit, AssocMaxCpuMinutesPerJobLimit …
_PER_JOB = re.compile(r"(Assoc|QOS)\w*Per(Job|Node)\w*")
_LIMIT = re.compile(r"(Assoc|QOS)(Grp|Max)(\w*)")


def explain_pending(word: str) -> Reason:
    """What Slurm's word for a pending job's reason means."""
    bare = word.split(",", 1)[0].strip() if word not in _REASONS else word
    if bare in _REASONS:
        return _REASONS[bare]
    whose = "account" if bare.startswith("Assoc") else "QOS"
    if _PER_JOB.fullmatch(bare):
        return Reason(f"it asks for more than its {whose} allows one job", "Ask for less, or choose another one.")
    if limit := _LIMIT.fullmatch(bare):
        who = f"all jobs of its {whose} together" if limit[2] == "Grp" else "you"
        return Reason(f"{who} have used up what its {whose} allows")
    return Reason("")


_STATES = {
    "TIMEOUT": "ran into its time limit",
    "OUT_OF_MEMORY": "used more memory than it had asked for",
    "NODE_FAIL": "was lost when its node failed",
    "PREEMPTED": "was preempted by a job of higher priority",
    "CANCELLED": "was cancelled",
    "BOOT_FAIL": "could not start: its node did not boot",
    "DEADLINE": "ran into its deadline",
    "FAILED": "failed",
    "COMPLETED": "ended",
    "REVOKED": "was revoked",
    "LOST": "is not known to Slurm any more",
}


def explain_end(state: str, by: str = "") -> str:
    """What a job's final state means, with Slurm's word: `ran into its time limit (TIMEOUT)`.

    Args:
        by: for CANCELLED, the user id that accounting names; empty where it does not say.
    """
    text = _STATES.get(state, "ended")
    return f"{text} by {_user(by)} ({state})" if by.isdigit() else f"{text} ({state})"


def _user(uid: str) -> str:
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (KeyError, OverflowError):
        return f"user {uid}"
