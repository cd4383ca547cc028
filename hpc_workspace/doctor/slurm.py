"""What Slurm is and allows here, by its own commands. Every question is bounded; a silent controller is asked once.

Source: scontrol(1), sinfo(1), sacctmgr(1), sbatch(1) and slurm.conf(5) of Slurm 24.11.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_workspace import clock, processes
from hpc_workspace.config import Settings
from hpc_workspace.doctor.finding import Check, Verdict, fail, ok, warn
from hpc_workspace.doctor.site import Site
from hpc_workspace.errors import PrerequisiteError, SchedulerUnavailableError
from hpc_workspace.launch import slurm_commands
from hpc_workspace.options import SlurmOptions

_QUESTION_TIMEOUT_S = 20.0
_NEEDED = ("sbatch", "squeue", "scancel", "srun", "scontrol")
_SMALL_ARRAY = 1001
_SLOW_ANSWER_S = 2.0
_PARTITIONS_TRIED = 4
_MOST_NAMED = 5
# sacctmgr(1), ASSOCIATION ENTITIES: bounds on one user's jobs; empty where there is none.
_LIMITS = ("MaxSubmitJobs", "MaxJobs", "MaxWall", "GrpSubmitJobs", "GrpJobs", "GrpTRES", "MaxTRES")
# sacctmgr(1), QOS: what one may give a user, or all its jobs together.
_QOS_LIMITS = ("MaxSubmitJobsPU", "MaxJobsPU", "MaxWall", "MaxTRESPU", "GrpSubmitJobs", "GrpJobs", "GrpTRES")
_SILENT = "Slurm's controller does not answer"


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo shows it. `time` is its limit, in Slurm's words."""

    name: str
    is_default: bool
    is_up: bool
    time: str


def look_commands(site: Site) -> Verdict:
    """Which of Slurm's commands there are, and their version."""
    missing = [name for name in _NEEDED if processes.find_program(name) is None]
    if not site.has_slurm:
        return ok("none: workspaces run on this machine")
    if missing:
        return fail(f"no {', '.join(missing)} on PATH", "Load Slurm's module, or put its directory on PATH.")
    return ok(_ask(["sbatch", "--version"]).stdout.strip() or "there")


def look_controller(site: Site) -> Verdict | None:
    """Whether slurmctld answers, and how soon."""
    if not site.has_slurm:
        return None
    began_s = clock.now_s()
    try:
        config = configuration(site)
    except SchedulerUnavailableError as error:
        return fail(f"{_SILENT}: {error.evidence}", _ASK_LATER)
    took_s = clock.now_s() - began_s
    found = f"{config.get('ClusterName', '?')}, answers in {took_s:.1f} s"
    if took_s > _SLOW_ANSWER_S:
        return warn(found, "It is busy. Nothing is lost: a workspace asks once in 30 s, and a silence ends nothing.")
    return ok(found)


_ASK_LATER = (
    "Try `scontrol ping`; ask the administrators if it stays silent (munge and the clock are the usual causes). "
    "Workspaces that run go on."
)


def configuration(site: Site) -> Mapping[str, str]:
    """Slurm's configuration by its own names, asked for once.

    Raises:
        SchedulerUnavailableError: the controller is silent; `evidence` has its words.
    """

    def ask() -> dict[str, str]:
        try:
            ended = _ask(slurm_commands.build_config_argv())
        except processes.ProgramTimeoutError as error:
            raise SchedulerUnavailableError(_SILENT, evidence=str(error)) from error
        except PrerequisiteError as error:
            raise SchedulerUnavailableError(_SILENT, evidence=error.what) from error
        if ended.returncode != 0:
            raise SchedulerUnavailableError(_SILENT, evidence=_first_line(ended.said))
        return slurm_commands.parse_config(ended.stdout)

    return site.once("slurm configuration", ask)


def look_job_limits(site: Site) -> Verdict | None:
    """How many jobs, and how large an array, the controller takes."""
    if (config := _known(site)) is None:
        return None
    array, jobs = _number(config.get("MaxArraySize")), _number(config.get("MaxJobCount"))
    found = f"MaxArraySize {_shown(array)}, MaxJobCount {_shown(jobs)}"
    if array is not None and array < _SMALL_ARRAY:
        return warn(found, f"Ask batch for at most {max(0, array - 1)} pilots: a larger array is refused.")
    return ok(found)


def look_submit(site: Site) -> Verdict | None:
    """Whether Slurm would take a job with the settings that hold: `sbatch --test-only`, which queues nothing."""
    if _known(site) is None:
        return None
    answer = _ask_to_take(site, {})
    if not answer.is_refused:
        return ok(answer.said)
    wanted = site.settings.slurm.partition
    if fitting := _fitting_partition(site):
        return Verdict(
            "warn" if wanted is None else "fail",
            answer.said,
            f'Set slurm.partition = "{fitting}": Slurm takes it.',
            {"slurm.partition": fitting},
        )
    accounts = _accounts(site)
    if len(accounts) > 1 and site.settings.slurm.account is None:
        for account in accounts[:_PARTITIONS_TRIED]:
            if not _ask_to_take(site, {"account": account}).is_refused:
                return warn(
                    answer.said,
                    f'Set slurm.account = "{account}": Slurm takes it.',
                    recommends={"slurm.account": account},
                )
    return fail(
        answer.said,
        "Set slurm.partition and slurm.account: `sinfo -s` and `sacctmgr show assoc user=$USER` list them.",
    )


@dataclass(frozen=True)
class _Submission:
    said: str
    is_refused: bool


def _ask_to_take(site: Site, more: Mapping[str, str]) -> _Submission:
    """What `sbatch --test-only` says of a workspace's job with `more` options."""
    options = SlurmOptions(**{**_given(site.settings), **more})
    with site.probe_dir(site.state) as probe:
        script = probe / "job.sbatch"
        script.write_text("#!/bin/sh\n")
        argv = slurm_commands.build_sbatch_argv(
            options, name="hpcws-doctor", directory=str(probe), script=str(script), log="log", exported=[]
        )
        ended = _ask([argv[0], "--test-only", *argv[1:]])
    said = ended.said.replace("sbatch: ", "").replace("error: ", "")
    # "Job 5 to start at 2026-11-24T10:00:00 using 1 processors on nodes n01 in partition cpu"
    start = re.search(r"to start at (\S+) .*on nodes? (\S+)(?: in partition (\S+))?", said)
    if ended.returncode == 0 and start:
        return _Submission(f"a job would start at {start[1]} on {start[2]}, partition {start[3] or '?'}", False)
    return _Submission(_first_line(said) or f"exit code {ended.returncode}", ended.returncode != 0)


def _given(settings: Settings) -> dict[str, object]:
    return {name: getattr(settings.slurm, name) for name in settings.slurm.model_fields_set}


def _fitting_partition(site: Site) -> str | None:
    """The first partition that takes the job; None if none does, of a few."""
    up = [one.name for one in partitions(site) if one.is_up and one.name != site.settings.slurm.partition]
    return next(
        (name for name in up[:_PARTITIONS_TRIED] if not _ask_to_take(site, {"partition": name}).is_refused), None
    )


def partitions(site: Site) -> list[Partition]:
    """Every partition that this user sees; none where sinfo does not say."""

    def ask() -> list[Partition]:
        ended = _ask(["sinfo", "--noheader", "--format=%P\x1f%a\x1f%l"])
        return parse_partitions(ended.stdout) if ended.returncode == 0 else []

    return site.once("partitions", ask)


def parse_partitions(text: str) -> list[Partition]:
    """The partitions of sinfo's lines of name (with * for the default), availability and time limit, each once."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("\x1f")]
        if len(fields) == 3 and fields[0]:
            name = fields[0].removesuffix("*")
            found.setdefault(name, Partition(name, fields[0].endswith("*"), fields[1] == "up", fields[2]))
    return list(found.values())


def look_partitions(site: Site) -> Verdict | None:
    """Which partitions there are, and which is meant if none is named."""
    if _known(site) is None:
        return None
    found = partitions(site)
    up = [one for one in found if one.is_up]
    shown = ", ".join(f"{one.name}{'*' if one.is_default else ''} ({one.time})" for one in up[:_MOST_NAMED])
    shown += f" and {len(up) - _MOST_NAMED} more" if len(up) > _MOST_NAMED else ""
    wanted = site.settings.slurm.partition
    if not up:
        return fail("none is up", "`sinfo` says more; ask the administrators.")
    if wanted is not None and wanted not in {one.name for one in up}:
        return fail(
            f"slurm.partition {wanted} is not there, or not up: {shown}", "Set slurm.partition to one of these."
        )
    if wanted is None and not any(one.is_default for one in up):
        return warn(f"no default among {shown}", "Set slurm.partition.", recommends={"slurm.partition": up[0].name})
    return ok(f"{shown}{f'; {wanted} by the settings' if wanted else ''}")


def describe_nodes(options: SlurmOptions) -> NodesWord:
    """How the nodes are that a job with `options` could run on, as sinfo has it."""
    argv = ["sinfo", "--noheader", "--Node", "--format=%N\x1f%T"]
    argv += [f"--partition={options.partition}"] if options.partition else []
    argv += [f"--nodes={options.nodelist}"] if options.nodelist else []
    try:
        ended = _ask(argv)
    except (PrerequisiteError, processes.ProgramTimeoutError):
        return NodesWord("", are_silent=False)
    return parse_nodes(ended.stdout if ended.returncode == 0 else "")


@dataclass(frozen=True)
class NodesWord:
    """States of nodes in sinfo's words, each with its nodes; empty where sinfo says nothing.

    Attributes:
        are_silent: whether not one of them answers Slurm.
    """

    text: str
    are_silent: bool


_FEW_NODES = 3


def parse_nodes(text: str) -> NodesWord:
    """sinfo's lines of node and state; a state that ends with * is that of a node that does not answer."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        node, _, state = (field.strip() for field in line.partition("\x1f"))
        if state and node not in found.setdefault(state, []):
            found[state].append(node)
    words = [
        f"{', '.join(nodes) if len(nodes) <= _FEW_NODES else f'{len(nodes)} nodes'}: {state}"
        + (" (does not answer Slurm)" if state.endswith("*") else "")
        for state, nodes in found.items()
    ]
    return NodesWord("; ".join(words), are_silent=bool(found) and all(state.endswith("*") for state in found))


def look_accounting(site: Site) -> Verdict | None:
    """Whether sacct knows what became of a job."""
    if (config := _known(site)) is None:
        return None
    kind = config.get("AccountingStorageType", "accounting_storage/none")
    without = "a job that squeue has forgotten can't be told from a lost one, nor who cancelled it"
    if kind.endswith("/none"):
        return ok(f"none: {without}")
    if processes.find_program("sacct") is None:
        return ok(f"{kind}, no sacct on PATH: {without}")
    ended = _ask(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID", "--starttime=now-1hours"])
    if ended.returncode != 0:
        return warn(
            f"sacct fails ({_first_line(ended.said)}): {without}", "Nothing breaks; tell the administrators (slurmdbd)."
        )
    return ok("sacct answers")


def look_account(site: Site) -> Verdict | None:
    """Which accounts this user has, and what bounds his jobs there."""
    if (config := _known(site)) is None or config.get("AccountingStorageType", "/none").endswith("/none"):
        return None
    accounts = _accounts(site)
    enforced = "associations" in config.get("AccountingStorageEnforce", "")
    if not accounts:
        if enforced:
            return fail("you have no account, and Slurm enforces them", "Ask the administrators for an account.")
        return ok("none, and none is needed")
    bounds = sorted({bound for rows in _associations(site) for bound in _bounds(rows)}) + _qos_bounds(site)
    found = f"{', '.join(accounts[:_MOST_NAMED])}; {', '.join(bounds[:_MOST_NAMED]) or 'no limits of your own'}"
    wanted = site.settings.slurm.account
    if wanted is not None and wanted not in accounts:
        return fail(f"slurm.account {wanted} is none of yours: {found}", "Set slurm.account to one of these.")
    if len(accounts) > 1 and wanted is None:
        return ok(f"{found}; the default counts unless slurm.account names one")
    return ok(found)


def _qos_bounds(site: Site) -> list[str]:
    """What the QOS that this user's jobs may have allow one user, in sacctmgr's own words."""
    usable = {name for row in _associations(site) for name in row.get("QOS", "").split(",") if name}
    if not usable:
        return []
    names = ("Name", *_QOS_LIMITS)
    ended = _ask(["sacctmgr", "--noheader", "--parsable2", "show", "qos", f"format={','.join(names)}"])
    rows = parse_rows(ended.stdout, names) if ended.returncode == 0 else []
    limits = [(row["Name"], [f"{name} {row[name]}" for name in _QOS_LIMITS if row[name]]) for row in rows]
    return [f"QOS {name}: {', '.join(found)}" for name, found in limits if name in usable and found]


def _bounds(row: Mapping[str, str]) -> list[str]:
    return [f"{name} {row[name]}" for name in _LIMITS if row.get(name)]


def _accounts(site: Site) -> list[str]:
    return list(dict.fromkeys(row["Account"] for row in _associations(site) if row.get("Account")))


def _associations(site: Site) -> list[dict[str, str]]:
    """This user's associations, by sacctmgr's own names; none without accounting."""

    def ask() -> list[dict[str, str]]:
        if processes.find_program("sacctmgr") is None:
            return []
        user = pwd.getpwuid(os.getuid()).pw_name
        names = ("Account", "Partition", "QOS", *_LIMITS)
        argv = ["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", f"format={','.join(names)}"]
        ended = _ask(argv)
        return parse_rows(ended.stdout, names) if ended.returncode == 0 else []

    return site.once("associations", ask)


def parse_rows(text: str, names: Sequence[str]) -> list[dict[str, str]]:
    """The rows of `sacctmgr --parsable2 show …` with these columns."""
    rows = (line.split("|") for line in text.splitlines())
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def look_preemption(site: Site) -> Verdict | None:
    """Whether a job may be taken off its node for another one."""
    if (config := _known(site)) is None:
        return None
    mode = config.get("PreemptMode", "OFF")
    if config.get("PreemptType", "preempt/none").endswith("/none") or mode == "OFF":
        return ok("no job is preempted")
    if "REQUEUE" in mode and not site.settings.slurm.requeue:
        return ok(f"PreemptMode {mode}: with requeue=True a workspace comes back, else its job ends PREEMPTED")
    return ok(f"PreemptMode {mode}")


def look_tracking(site: Site) -> Verdict | None:
    """Whether Slurm keeps a job's processes and memory together by cgroups."""
    if (config := _known(site)) is None:
        return None
    track, task = config.get("ProctrackType", "?"), config.get("TaskPlugin", "?")
    found = f"{track}, {task}"
    if "cgroup" not in track:
        return warn(
            found,
            "Processes can outlive a job: `srun -w NODE hpc-workspace reap` clears up. proctrack/cgroup is safer.",
        )
    if "cgroup" not in task:
        return warn(found, "Memory limits don't kill: share no node (exclusive), or ask for task/cgroup.")
    return ok(found)


def look_private_tmp(site: Site) -> Verdict | None:
    """Whether each job has a /tmp of its own."""
    if (config := _known(site)) is None:
        return None
    container = config.get("JobContainerType", "none").rpartition("/")[2]
    if container == "none":
        return ok("jobs of one node share /tmp (no job_container plugin)")
    return ok(f"job_container/{container}: each job has its own; what a killed one leaves goes with it")


def _known(site: Site) -> Mapping[str, str] | None:
    """The configuration; None without Slurm or while it is silent, which is `look_controller`'s to say."""
    if not site.has_slurm:
        return None
    try:
        return configuration(site)
    except SchedulerUnavailableError:
        return None


def _ask(argv: Sequence[str]) -> processes.Completed:
    return processes.run(argv, timeout_s=_QUESTION_TIMEOUT_S, env=slurm_commands.strip_environment(os.environ))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _shown(number: int | None) -> str:
    return "?" if number is None else str(number)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


CHECKS = (
    Check("slurm commands", "Jobs are submitted and watched by them.", look_commands, on_node=False),
    Check("slurm controller", "Nothing can be submitted while it is silent.", look_controller, on_node=False),
    Check("partitions", "A job runs in one.", look_partitions, on_node=False),
    Check("submit", "A job that Slurm would refuse is better known before.", look_submit, on_node=False),
    Check("job limits", "They bound batch's arrays.", look_job_limits, on_node=False),
    Check("accounts", "They bound how much you may run.", look_account, on_node=False),
    Check("accounting", "It says how a job ended after squeue has forgotten it.", look_accounting, on_node=False),
    Check("preemption", "A preempted job takes its workspace with it.", look_preemption, on_node=False),
    Check("tracking", "It ends what a job leaves, and keeps its memory limit.", look_tracking, on_node=False),
    Check("private /tmp", "Scratch of one job is hidden from another, and from SSH.", look_private_tmp, on_node=False),
)
