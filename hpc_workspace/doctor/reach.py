"""What is between this machine and a compute node: the job, the state directory, locks, clocks, and every route.

All of it is tried with the doctor's other half, in a job on that node, and with a real workspace that it starts there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hpc_workspace import clock, files
from hpc_workspace.connect import ladder
from hpc_workspace.connect.loopback import is_this_node
from hpc_workspace.connect.streams import open_door
from hpc_workspace.doctor import slurm
from hpc_workspace.doctor.finding import Check, Finding, Verdict, fail, ok, warn
from hpc_workspace.doctor.here import held_lock, judge_skew
from hpc_workspace.doctor.node_job import NodeJob
from hpc_workspace.doctor.node_side import wait_for_text
from hpc_workspace.doctor.runner import Bounded, run_checks
from hpc_workspace.doctor.site import Site, nearest
from hpc_workspace.errors import JobError, PrerequisiteError, QueueTimeoutError, TunnelError, WorkspaceError
from hpc_workspace.exchange import Wish
from hpc_workspace.options import SlurmOptions
from hpc_workspace.record import Record
from hpc_workspace.rendezvous import WorkspaceDirectory, workspaces_dir
from hpc_workspace.version import __version__

QUEUE_TIMEOUT_S = 300.0
# NFS remembers that a file was not there for 30 to 60 s; nfs(5), acdirmax.
_SEEN_TIMEOUT_S = 75.0
_LATE_S = 5.0
_KNOWN = 100
_ANSWER_TIMEOUT_S = 30.0
_CHECKS_TIMEOUT_S = 120.0
_START_TIMEOUT_S = 60.0
_ROUTE_TIMEOUT_S = 45.0
_SLOW_ROUTE_S = 3.0


@dataclass(frozen=True)
class Look:
    """A check that needs the other half; see `Check`."""

    name: str
    why: str
    look: Callable[[Site, NodeJob], Verdict | None]

    def bound(self, job: NodeJob) -> Check:
        return Check(self.name, self.why, lambda site: self.look(site, job))


def look_job(site: Site, job: NodeJob) -> Verdict:
    """How long a small job takes to its first word."""
    return ok(f"job {job.job_id} on {job.node}, partition {job.partition}: its first word after {job.start_s:.1f} s")


def look_package(site: Site, job: NodeJob) -> Verdict:
    """Whether the node has the same version of this package."""
    if job.version != __version__:
        return fail(
            f"{job.version} on the node, {__version__} here",
            "Set slurm.python to an interpreter that has the same version, one on a shared disk best.",
        )
    return ok(f"{job.version} on both sides")


def look_shared(site: Site, job: NodeJob) -> Verdict:
    """Whether what is written to the state directory here is read there, and the other way, and how late."""
    text = secrets.token_hex(16)
    elsewhere = "Set HPC_WORKSPACE_HOME to a directory that login and compute nodes share."
    known = [name for name in os.listdir(nearest(site.state)) if not name.startswith(".hpcws-doctor-")][:_KNOWN]
    with site.probe_dir(site.state) as probe:
        files.write_whole(probe / "from-here", text.encode())
        patience_s = _SEEN_TIMEOUT_S + _ANSWER_TIMEOUT_S
        answer = job.ask(
            "see", patience_s=patience_s, folder=str(probe), known=known, text=text, timeout_s=_SEEN_TIMEOUT_S
        )
        if answer["seen_s"] is None:
            return fail(f"{site.state}: {job.node} {answer['why']}", elsewhere)
        back_s = wait_for_text(probe, "from-node", text[::-1], _SEEN_TIMEOUT_S)
        if back_s is None:
            return fail(f"{site.state}: what {job.node} writes is not seen here", elsewhere)
        if answer["uid"] != os.getuid():
            return fail(
                f"you are user {os.getuid()} here and see user {answer['uid']} there", "Tell the administrators."
            )
    found = f"there after {answer['seen_s']:.2f} s, back after {back_s:.2f} s"
    if max(answer["seen_s"], back_s) > _LATE_S:
        return warn(
            found,
            "Files appear late (NFS: mount with lookupcache=positive); a start takes that much longer, nothing else.",
        )
    return ok(found)


def look_far_locks(site: Site, job: NodeJob) -> Verdict:
    """Whether a lock that is held here is refused there."""
    with site.probe_dir(site.state) as probe:
        try:
            with held_lock(probe / "lock"):
                found = job.ask("lock", patience_s=_ANSWER_TIMEOUT_S, path=str(probe / "lock"))["lock"]
        except OSError as error:
            found = errno.errorcode.get(error.errno or 0, str(error))
    if found == "refused":
        return ok(f"a lock that is held here is refused on {job.node}")
    nothing = "Nothing breaks: locks only save work done twice. Lustre's flock mount option (not localflock) mends it."
    if found == "held":
        return warn(f"{job.node} holds a lock that is held here: each node has its own", nothing)
    return warn(f"no locks between nodes ({found})", nothing)


def look_clocks(site: Site, job: NodeJob) -> Verdict:
    """The node's clock against this one, as far as the question took."""
    before_s = clock.wall_s()
    there_s = float(job.ask("clock", patience_s=_ANSWER_TIMEOUT_S)["wall_s"])
    after_s = clock.wall_s()
    if before_s <= there_s <= after_s:
        return judge_skew(0.0, f"{job.node}'s clock")
    return judge_skew(before_s - there_s if there_s < before_s else after_s - there_s, f"{job.node}'s clock")


LOOKS = (
    Look("node job", "A workspace on a node is a job.", look_job),
    Look("node package", "Both sides must speak alike.", look_package),
    Look("shared directory", "The node tells through the state directory where the workspace is.", look_shared),
    Look(
        "locks between nodes", "They keep nodes from fetching one image twice; nothing is lost without.", look_far_locks
    ),
    Look("clocks", "Munge, and so Slurm, refuses what comes from another time.", look_clocks),
)
ROUTE = "route {}"
ROUTES_WHY = "A workspace on a node is used through one of them, the first that works."


def examine_node(
    site: Site,
    options: SlurmOptions,
    here: Iterable[Finding],
    *,
    say: Callable[[str], None],
    queue_timeout_s: float = QUEUE_TIMEOUT_S,
) -> tuple[str, list[Finding]]:
    """The name of a node (empty if no job ran there) and all that can be found with a job on it.

    Args:
        options: of the job: where it runs, and what a workspace's would have.
        here: what was found on this machine.
        say: told in words what is waited for.
    """
    lacks_network = any(finding.name in ("dns", "internet") and finding.level == "warn" for finding in here)
    first = LOOKS[0]
    try:
        job = NodeJob(options, queue_timeout_s=queue_timeout_s, say=say)
    except QueueTimeoutError as error:
        nodes = slurm.describe_nodes(options)
        remedy = "Name another partition: --node PARTITION."
        if nodes.are_silent:
            remedy = f"Its slurmd, munge or network is away: tell the administrators. {remedy}"
        found = " ".join(part for part in (error.what, _last(error.evidence), nodes.text) if part)
        return "", [Finding.of(first.name, first.why, fail(found, remedy))]
    except (JobError, PrerequisiteError) as error:
        verdict = fail(f"{error.what} {_last(error.evidence)}".strip(), error.remedy)
        return "", [Finding.of(first.name, first.why, verdict)]
    with contextlib.closing(job):
        return job.node, list(_examine(site, job, say, lacks_network=lacks_network))


def _examine(site: Site, job: NodeJob, say: Callable[[str], None], *, lacks_network: bool) -> Iterator[Finding]:
    is_shared = False
    for look in LOOKS:  # one after the other: the other half answers one question at a time
        say(f"{job.node}: {look.name}")
        for finding in run_checks([look.bound(job)], site, node=job.node, timeout_s=3 * _SEEN_TIMEOUT_S):
            is_shared = is_shared or (look.look is look_shared and finding.level != "fail")
            yield finding
    say(f"{job.node}: the node itself")
    yield from _examine_machine(site, job, lacks_network=lacks_network)
    say(f"{job.node}: routes")
    yield from examine_routes(job, is_shared=is_shared)


def _examine_machine(site: Site, job: NodeJob, *, lacks_network: bool) -> Iterator[Finding]:
    try:
        answer = job.ask(
            "check", patience_s=_CHECKS_TIMEOUT_S, has_store=site.store.exists(), lacks_network=lacks_network
        )
        yield from [Finding.parse(value) for value in answer["findings"]]
    except (JobError, ValueError) as error:
        verdict = fail(f"it did not say how it is: {_last(str(error))}", "Try `srun hpc-workspace doctor`.")
        yield Finding.of("node", "It is where workspaces run.", verdict, job.node)


def examine_routes(job: NodeJob, *, is_shared: bool) -> list[Finding]:
    """A finding for each route of the ladder, tried with a workspace of its own on the node.

    Args:
        is_shared: whether both sides see the state directory: without it there is no workspace to reach.
    """

    def only(verdict: Verdict) -> list[Finding]:
        return [Finding.of("routes", ROUTES_WHY, verdict, job.node)]

    if not is_shared:
        return only(fail("not tried: the node does not see the state directory", "See `shared directory`."))
    try:
        made = job.ask("workspace", patience_s=_START_TIMEOUT_S)
        directory = WorkspaceDirectory(workspaces_dir() / made["id"])
        record = directory.wait_record(lambda record: record.state == "ready", timeout_s=_SEEN_TIMEOUT_S)
        token = directory.read_token()
    except WorkspaceError as error:
        return only(fail(f"not tried: {error.what} {_last(error.evidence)}", error.remedy))
    if record is None:
        return only(fail("not tried: the workspace's record is not seen here", "See `shared directory`."))
    # It was started inside the job, and not by it, and so does not name it; a route may need to.
    record = record.model_copy(update={"job_id": job.job_id})
    return judge_routes([try_route(name, record, token) for name in ladder._RUNGS], record.node)


def try_route(name: str, record: Record, token: str) -> Tried:
    """Connect by the route `name` and make a request, within a bound of time."""

    def otherwise(found: str, remedy: str) -> Tried:
        return Tried(name, _ROUTE_TIMEOUT_S, error=TunnelError(found, node=record.node, remedy=remedy))

    route = Bounded(name, lambda: Tried.of(name, record, token), otherwise)
    return route.wait(clock.Deadline(_ROUTE_TIMEOUT_S))


@dataclass(frozen=True)
class Tried:
    """One route, tried.

    Attributes:
        connect_s: until the door had proven itself and the lease was held.
        request_s: for one small request after a first one.
        error: why there is no way; None: there is.
        took_s: until that was known.
    """

    name: str
    took_s: float
    connect_s: float = 0.0
    request_s: float = 0.0
    error: WorkspaceError | None = None

    @classmethod
    def of(cls, name: str, record: Record, token: str) -> Tried:
        """Connect by the route `name` and make a request."""
        began = clock.Deadline(None)
        try:
            connect_s, request_s = _try_route(name, record, token)
        except WorkspaceError as error:
            return cls(name, began.elapsed_s, error=error)
        return cls(name, began.elapsed_s, connect_s, request_s)


def _try_route(name: str, record: Record, token: str) -> tuple[float, float]:
    """Seconds for connecting, and for one small request. Raises: WorkspaceError: there is no way."""
    from hpc_workspace.client import AgentServerClient, AtOnce

    began = clock.Deadline(None)
    route, lease = ladder.climb(name, record, token, Wish(want="lease"))
    with contextlib.closing(route), contextlib.closing(lease):
        connect_s = began.elapsed_s
        client = AgentServerClient(
            AtOnce(lambda wish: open_door(route, record.node, token, record.workspace_id, wish)),
            api_key=token,
            server=record.server,
            working_dir=record.working_dir,
        )
        with contextlib.closing(client):
            client.health()
            began = clock.Deadline(None)
            client.health()
            return connect_s, began.elapsed_s


def judge_routes(tried: list[Tried], node: str) -> list[Finding]:
    """What it means that these routes work and those do not, in the order in which they are climbed."""
    working = [one for one in tried if one.error is None]
    best = working[0] if working else None
    lost_s = sum(one.took_s for one in tried[: tried.index(best)]) if best is not None else 0.0
    found = []
    for one in tried:
        if one.error is None:
            verdict = ok(f"connected in {1000 * one.connect_s:.0f} ms, a request takes {1000 * one.request_s:.1f} ms")
            if one is best and lost_s > _SLOW_ROUTE_S:
                verdict = warn(
                    f"{verdict.found}; it comes after others that fail for {lost_s:.0f} s",
                    f'Set workspace.connect = "{one.name}".',
                    recommends={"workspace.connect": one.name},
                )
        elif one.name == "loopback" and not is_this_node(node):
            verdict = ok(f"not from here: {node} is another machine")
        else:
            said = f"{one.error.what} {_last(one.error.evidence)}".strip()
            if best is None:
                verdict = fail(said, one.error.remedy)
            elif tried.index(one) > tried.index(best):
                verdict = ok(f"not needed, {best.name} comes first; {said}")
            else:
                verdict = warn(said, f"{one.error.remedy} Until then {best.name} is used.".strip())
        found.append(Finding.of(ROUTE.format(one.name), ROUTES_WHY, verdict, node))
    return found


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
