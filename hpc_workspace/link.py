"""The line to one workspace: its record, the way to its door, the lease, and what it means when one of them breaks.

A workspace in a job that may be requeued has several lives, one after the other: the same job, another node, another
record, other files. The line outlasts them. Whoever was cut off by the end of a life, or comes first after it, is told
once (`SandboxRestarted`); then calls go on in the new life.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from hpc_workspace import clock, errors
from hpc_workspace.connect.ladder import climb
from hpc_workspace.connect.streams import DoorStream, Route, open_door
from hpc_workspace.errors import (
    AuthError,
    ContainerError,
    JobEndedError,
    QueueTimeoutError,
    RendezvousStaleError,
    SandboxRestarted,
    SchedulerUnavailableError,
    TunnelError,
    TunnelLostError,
    WorkspaceError,
)
from hpc_workspace.exchange import Wish
from hpc_workspace.launch.launched import Launched
from hpc_workspace.launch.watch import watch
from hpc_workspace.record import Record
from hpc_workspace.rendezvous import STALE_S, WorkspaceDirectory

log = logging.getLogger(__name__)

END_TIMEOUT_S = 20.0
_LOCAL_LOOK_S = (0.01, 0.02)
# A tenth of the time that it has taken already: a start of a second is not noticed half a second late.
_SLURM_LOOK_S = (0.02, 0.5, 1.1)
# The record of a job that ended may reach this side a moment after Slurm's word.
_LAST_LOOK_S = 1.0
# How long a broken connection may take to turn out to be the end of the workspace.
_FAREWELL_S = 3.0
# A way that was cut sooner than this after it was made, would be cut again by what cut it.
_SHORT_WAY_S = 10.0
_NEIGHBOURS_S = 60.0
# Slurm tells of a job's end when its epilog is done and the answer that we have is not 2 s old any more.
_JOB_END_S = 12.0


class Link:
    """Reaches one workspace's door, through whatever becomes of the way to it. Safe to use from several threads.

    Args:
        launched: its node program, as it was started or found.
        launch_id: of the launch that counts; records of another are not used.
        connect: a route's name, or `auto`.
        queue_timeout_s: how long a job may wait for its start, each time; None: for ever.
        say: told in words how a wait gets on.
    """

    def __init__(
        self,
        directory: WorkspaceDirectory,
        launched: Launched,
        *,
        launch_id: str,
        connect: str,
        queue_timeout_s: float | None = None,
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.launched = launched
        self.record: Record | None = None
        self._directory = directory
        self._launch_id = launch_id
        self._connect_by = connect
        self._way = connect
        self._queue_timeout_s = queue_timeout_s
        self._say = say
        self.token = ""
        self._route: Route | None = None
        self._lease: DoorStream | None = None
        self._lost: WorkspaceError | None = None
        # Of the last life that the user knows of. Changed, and compared, with `_telling` held alone.
        self._told_restarts = 0
        self._telling = threading.Lock()
        self._is_between_lives = False
        self._closed = threading.Event()
        # Held by the one who finds out why something broke; the others wait for what comes of it.
        self._inquiry = threading.RLock()
        self._inquired_s = -math.inf
        # Calls that began before this were cut off by the end of an earlier life.
        self._life_began_s = -math.inf
        self._way_began_s = -math.inf
        _links.add(self)

    def __repr__(self) -> str:
        state = "lost" if self._lost else "connected" if self._route else "not connected"
        return f"<Link {self._directory.workspace_id} [{state}]>"

    def wait_ready(self, *, fewest_restarts: int = 0) -> Record:
        """The record, once it says ready; `connect` is for it. Looks at the directory first, and asks Slurm every 2 s.

        Args:
            fewest_restarts: of the job; records of its earlier lives are not used.

        Raises:
            QueueTimeoutError: the job has waited for too long; it still does.
            WorkspaceError: it failed, or its job ended.
        """
        in_slurm = self.launched.job_id is not None
        queue = clock.Deadline(self._queue_timeout_s)
        said = self.launched.describe()
        for pause_s in clock.pauses_s(*(_SLURM_LOOK_S if in_slurm else _LOCAL_LOOK_S)):
            if (record := self._ready_record(fewest_restarts)) is not None:
                return record
            if (end := self.launched.find_end()) is not None:
                clock.sleep(_LAST_LOOK_S if in_slurm else 0.0)
                self._ready_record(fewest_restarts)
                raise end
            if self.launched.is_pending() and queue.is_over:
                raise QueueTimeoutError(
                    f"Slurm job {self.launched.job_id} was still in the queue after {queue.timeout_s:g} s.",
                    job_id=self.launched.job_id or "",
                    evidence=self.launched.describe(),
                    remedy="Raise queue_timeout, ask for less, or choose another partition.",
                )
            if self.launched.describe() != said:
                said = self.launched.describe()
                self._say(f"{self._directory.workspace_id}: {said}")
            if self._closed.wait(pause_s):
                raise self._closed_error()
        raise AssertionError("pauses never end")

    def _ready_record(self, fewest_restarts: int) -> Record | None:
        """The record of this launch and life, once it is ready.

        Raises:
            WorkspaceError: the node program says that it failed, or ended.
        """
        record = self._directory.read_record()
        if record is None or record.launch_id != self._launch_id or record.restart_count < fewest_restarts:
            return None
        if record.failure is not None:
            raise as_error(record)
        if record.is_final:
            # A job that is requeued before its workspace was ready has another life to come.
            if record.may_restart and self.launched.find_end() is None:
                return None
            raise ContainerError(
                f"Workspace {record.workspace_id} ended on {record.node} before it was used: {record.exit_reason}."
            )
        return record if record.state == "ready" else None

    def connect(self, record: Record) -> None:
        """Take the lease by the first route that works, and have the job watched; from now on `record` is the one.

        Raises:
            RendezvousError: there is no key (the workspace has ended).
            TunnelError: it can't be reached.
            ContainerError: the link was closed meanwhile.
        """
        self._told_restarts = record.restart_count
        self._connect(record, by=self._connect_by)

    def _connect(self, record: Record, *, by: str, life_began_s: float | None = None) -> None:
        token = self._directory.read_token()
        route, lease = climb(by, record, token, Wish(want="lease"))
        self.token, self._way, self.record = token, route.name, record
        if life_began_s is not None:
            self._life_began_s = life_began_s
        # The route last: from here on calls go by it.
        self._lease, self._route = lease, route
        self._way_began_s = clock.now_s()
        self.launched.note_ready(record.node)
        if self.launched.job_id is not None:
            watch.add(self)
        if self._closed.is_set():  # by somebody who did not wait for us
            self.disconnect()
            raise self._closed_error()

    def dial(self, wish: Wish, call_began_s: float = math.inf) -> DoorStream:
        """A stream to what is wished for.

        Args:
            call_began_s: when the call that it is for had begun: one of an earlier life does not go on in this.

        Raises:
            SandboxRestarted: for such a call; else for the first one of a new life, if no other was cut off.
            WorkspaceError: there is no way; it says why.
        """
        if self._is_to_be_told():
            raise self._restarted()
        stream = self._dial_or_explain(wish, is_ours=True)
        if (restarted := self.restart_since(call_began_s)) is not None:
            stream.close()
            raise restarted
        return stream

    def dial_for_others(self, wish: Wish) -> DoorStream:
        """As `dial`, for clients that know nothing of us: they find the new life, and our user is still told of it."""
        try:
            return self._dial_or_explain(wish, is_ours=False)
        except SandboxRestarted:
            return self._dial_or_explain(wish, is_ours=False)

    def _is_to_be_told(self) -> bool:
        """Whether the user does not know yet of the life that this is; from now on he does."""
        count = self.record.restart_count if self.record is not None else 0
        with self._telling:
            is_new = count > self._told_restarts
            self._told_restarts = max(count, self._told_restarts)
        return is_new

    def restart_since(self, call_began_s: float) -> WorkspaceError | None:
        """That the life in which a call began is over, and another has begun; None: it is not."""
        if call_began_s >= self._life_began_s:
            return None
        self._is_to_be_told()
        return self._restarted()

    def _dial_or_explain(self, wish: Wish, *, is_ours: bool) -> DoorStream:
        began_s = clock.now_s()
        lease = self._lease
        if lease is not None and lease.is_readable():
            # It ended while nobody looked. A stream can do without, but the door must not think that we are gone.
            lost = TunnelLostError("the lease has ended", node=self._require_record().node)
            found = self._explain(lost, began_s, is_ours=is_ours)
            if not isinstance(found, TunnelError):
                raise found
        try:
            return self.dial_at_once(wish)
        except TunnelError as error:
            raise self._explain(error, began_s, is_ours=is_ours) from error

    def dial_at_once(self, wish: Wish) -> DoorStream:
        """A stream to what is wished for, by the way that there is. Waits for nothing and mends nothing.

        Raises: as `open_door`, or why there is no way any more.
        """
        record, route = self._require_record(), self._route
        if self._lost is not None:
            raise self._lost
        if self._closed.is_set():
            raise self._closed_error()
        if route is None:
            raise TunnelError(f"There is no way to workspace {record.workspace_id} at present.", node=record.node)
        return open_door(route, record.node, self.token, record.workspace_id, wish)

    def explain(self, error: WorkspaceError, since_s: float) -> WorkspaceError:
        """`error`, a broken connection, or what it was that broke it. After a restart, waits for the new life.

        Args:
            since_s: when the try that it broke had begun, by our clock.
        """
        return self._explain(error, since_s, is_ours=True)

    def _explain(self, error: WorkspaceError, since_s: float, *, is_ours: bool) -> WorkspaceError:
        """As `explain`. Only of what is `ours` does the user hear."""
        with self._inquiry:
            if since_s < self._life_began_s:
                if is_ours:
                    self._is_to_be_told()
                return self._restarted()
            if self._lost is not None or self._closed.is_set():
                return self._lost or self._closed_error()
            found = error
            if since_s >= self._inquired_s:
                try:
                    found = self._inquire(error, is_ours=is_ours)
                except WorkspaceError as other:
                    found = other
                finally:
                    self._inquired_s = clock.now_s()
            if isinstance(found, TunnelLostError):
                found.is_way_made_anew = since_s < self._way_began_s
            return found

    def _inquire(self, error: WorkspaceError, *, is_ours: bool) -> WorkspaceError:
        """The door says goodbye on the lease once all is gone and the record says why. If the node program itself was
        killed there is no goodbye, and its warden writes the record a moment later. A node that died says nothing."""
        record = self._require_record()
        if not self._is_between_lives and not self._has_left():
            if not self._lease_ends():
                return error
            try:
                final = self._read_end()
                if final is None:
                    if (failed := self._reconnect()) is None:
                        return error
                    final = self._read_end(_FAREWELL_S)
            except RendezvousStaleError:
                return ContainerError(
                    f"{record.workspace_id} on {record.node} has ended: somebody else closed it.", evidence=error.what
                )
            if final is None:
                # Nobody was left to say how it ended; or somebody else has its port, and nobody tries that again.
                return self.launched.find_end() or (failed if isinstance(failed, AuthError) else error)
            if final.failure is not None and final.restart_count == record.restart_count:
                return as_error(final)
            if not record.may_restart:
                return self._wait_job_end() or ContainerError(
                    f"Workspace {final.workspace_id} on {final.node} has ended: {final.exit_reason}.",
                    evidence=error.what,
                )
        self._begin_new_life(is_ours=is_ours)
        return self._restarted()

    def _lease_ends(self) -> bool:
        """Whether the lease ends within a moment, or has ended: what broke was more than one stream."""
        if (lease := self._lease) is None:
            return True
        lease.settimeout(_FAREWELL_S)
        try:
            lease.wait_ended()
        except TimeoutError:
            return False
        except (OSError, WorkspaceError) as error:
            log.debug("the lease has broken: %s", error)
        return True

    def _reconnect(self) -> WorkspaceError | None:
        """Take the same way to the same life anew: the lease is held and the next call works. Returns why not."""
        self._let_go()
        if clock.now_s() - self._way_began_s < _SHORT_WAY_S:
            self._wait_for_neighbours()
        try:
            self._connect(self._require_record(), by=self._way)
        except WorkspaceError as error:
            log.debug("no new way: %s", error)
            return error
        return None

    def _wait_for_neighbours(self) -> None:
        """Wait until no job of ours ends on the node any more.

        With pam_slurm_adopt a job that is ending adopts each new login, which Slurm then kills; and as long as there
        are new ones, the job does not end. Seen with Slurm 24.11, whose pauses between two looks grow to 8 s.
        """
        record, deadline = self._require_record(), clock.Deadline(_NEIGHBOURS_S)
        for pause_s in clock.pauses_s(*_SLURM_LOOK_S):
            if deadline.is_over or not self.launched.has_ending_neighbour(record.node) or self._closed.wait(pause_s):
                return
            log.info("%s: another job is ending on %s, which may cut logins", record.workspace_id, record.node)

    def _read_end(self, timeout_s: float = 0.0) -> Record | None:
        """The record once it says how this life ended, or is of a later one; None if it does not in time.

        Raises:
            RendezvousError: it can't be read.
        """
        count = self._require_record().restart_count
        return self._directory.wait_record(
            lambda record: record.is_final or record.restart_count > count, timeout_s=timeout_s
        )

    def _has_left(self) -> bool:
        """Whether this life of the job is over, and the job itself is not: by Slurm's word, or by a later record."""
        record = self._require_record()
        if not record.may_restart:
            return False
        if self.launched.has_left(record.node):
            return True
        later = self._directory.read_record()
        return later is not None and later.restart_count > record.restart_count

    def _begin_new_life(self, *, is_ours: bool) -> None:
        """Wait until the job runs again and its workspace is ready, and connect to that.

        Args:
            is_ours: whether the user is told of it by who waits for it.

        Raises:
            WorkspaceError: it will not, or can't be reached.
        """
        old = self._require_record()
        self._is_between_lives = True
        self._let_go()
        self._say(f"{old.workspace_id}: its life on {old.node} is over, waiting for the next")
        try:
            new = self.wait_ready(fewest_restarts=old.restart_count + 1)
        except (JobEndedError, ContainerError) as end:
            self._lost = end
            raise
        told = self._told_restarts
        if is_ours:  # before anybody else can come by the new way, who would be told as well
            self._told_restarts = max(told, new.restart_count)
        try:
            self._connect(new, by=self._connect_by, life_began_s=clock.now_s())
        except BaseException:
            self._told_restarts = told
            raise
        self._is_between_lives = False
        self._say(f"{old.workspace_id}: restarted on {new.node}")

    def _restarted(self) -> SandboxRestarted:
        record = self._require_record()
        kept = f"what is under mount_dir {record.mount_dir} was kept" if record.mount_dir else "nothing was kept"
        return SandboxRestarted(
            f"Slurm requeued job {record.job_id}: workspace {record.workspace_id} runs anew on {record.node} "
            f"(restart {record.restart_count}).",
            evidence=f"Its processes and files are gone; {kept}.",
            node=record.node,
            job_id=record.job_id or "",
            restart_count=record.restart_count,
            kept=record.mount_dir,
            remedy="Prepare it anew and go on: the next call goes to the new one.",
        )

    def _wait_job_end(self) -> JobEndedError | None:
        """What Slurm says of a job that is ending; None if it ended by itself, or Slurm does not say in time."""
        if self.launched.job_id is None:
            return None
        deadline = clock.Deadline(_JOB_END_S)
        for pause_s in clock.pauses_s(*_SLURM_LOOK_S):
            error = self.launched.find_end()
            if isinstance(error, JobEndedError):
                return None if error.state == "COMPLETED" else error
            if deadline.is_over:
                break
            clock.sleep(min(pause_s, deadline.left_s))
        return None

    def find_news(self) -> Callable[[], None] | None:
        """For the watch: what is to be done about what has happened to the job; None: nothing has."""
        if (error := self.launched.find_end()) is not None:
            return functools.partial(self._on_job_ended, error)
        if self._has_left():
            return functools.partial(self._on_life_ended, self._require_record())
        lease = self._lease
        return self._on_lease_ended if lease is None or lease.is_readable() else None

    def _on_job_ended(self, error: WorkspaceError) -> None:
        """Break every connection, so that whoever waits on one is told. Without the lock: who holds that may be
        waiting on one of them."""
        watch.remove(self)
        if isinstance(error, JobEndedError) and error.state == "COMPLETED":
            error = ContainerError(f"Workspace {self._directory.workspace_id} has ended.", evidence=error.what)
        self._lost = error
        self._let_go()

    def _on_life_ended(self, old: Record) -> None:
        """Break every connection, as above, and take the lease of the new life, so that it does not count as idle."""
        if self.record is not old:
            return  # somebody whose call was broken has been quicker
        self._is_between_lives = True
        self._let_go()
        self._explain(TunnelError("its job was requeued", node=old.node), clock.now_s(), is_ours=False)

    def _on_lease_ended(self) -> None:
        """Take it anew, so that a client that is silent for long does not count as gone; or learn that all is over."""
        lost = TunnelLostError("its lease has ended", node=self._require_record().node)
        self._explain(lost, clock.now_s(), is_ours=False)

    def end(self) -> bool:
        """End the workspace, through its door or else from outside. Returns whether it was gone in time.

        It can be called again after an interruption, and does all of it again.
        """
        told = self.record is not None and self._end_through_door()
        self.disconnect()
        # A node program that was told and does not end hangs: in a file system that is away, say.
        if told and self.launched.wait_gone(END_TIMEOUT_S):
            return True
        try:
            self.launched.end()
        except SchedulerUnavailableError as error:
            log.warning("%s", error)
        return self.launched.wait_gone(END_TIMEOUT_S)

    def _end_through_door(self) -> bool:
        """Ask the door for the end and wait for its goodbye. Returns whether it was told."""
        try:
            stream = self.dial_at_once(Wish(want="end"))
            stream.wait_granted()
        except WorkspaceError as error:
            log.debug("the door can't be told to end: %s", error)
            return False
        with contextlib.closing(stream):
            stream.settimeout(END_TIMEOUT_S)
            try:
                stream.wait_ended()
            except OSError as error:
                log.debug("no goodbye from the door: %s", error)
        return True

    def disconnect(self) -> None:
        """Let go of the workspace; whoever waits for it is told that this side has closed."""
        self._closed.set()
        watch.remove(self)
        self._let_go()

    def _let_go(self) -> None:
        # The route first: a lease of a dead node may not be closed before its connection is.
        route, lease = self._route, self._lease
        self._route = self._lease = None
        close_quietly(route)
        close_quietly(lease)

    def _require_record(self) -> Record:
        if self.record is None:
            raise ContainerError(f"{self._directory.workspace_id} is not ready.", remedy="Call start().")
        return self.record

    def _closed_error(self) -> ContainerError:
        return ContainerError(f"Workspace {self._directory.workspace_id} is closed.")


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _forget_after_fork() -> None:
    """A forked child has copies of its parent's leases: they must not hold what the parent let go, nor end it."""
    for link in list(_links):
        if link._lease is not None:
            link._lease.abandon()
        link._route = link._lease = None
        link._inquiry, link._telling = threading.RLock(), threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


class Closable(Protocol):
    def close(self) -> object: ...


def close_quietly(part: Closable | None) -> None:
    """Close what may be broken already: a connection to a node that is gone can't be closed in good order."""
    if part is None:
        return
    try:
        part.close()
    except (OSError, EOFError) as error:
        log.debug("%r was not closed in good order: %s", part, error)


def as_error(record: Record) -> WorkspaceError:
    """The node program's failure as an error of this process."""
    failure = record.failure
    assert failure is not None
    kind = getattr(errors, failure.kind, WorkspaceError)
    if not (isinstance(kind, type) and issubclass(kind, WorkspaceError)):
        kind = WorkspaceError
    return kind(failure.what, evidence=failure.evidence, remedy=failure.remedy)


def require_running(directory: WorkspaceDirectory, record: Record) -> None:
    """Make sure that a workspace that was found lives.

    Raises:
        RendezvousStaleError: it has ended, or gave no sign of life for two minutes.
        WorkspaceError: it failed; this is its failure.
    """
    if record.failure is not None:
        raise as_error(record)
    if record.is_final:
        raise RendezvousStaleError(
            f"Workspace {record.workspace_id} has ended: {record.exit_reason}.",
            remedy=f"If Slurm requeues job {record.job_id}, it will be there again." if record.may_restart else "",
        )
    age_s = directory.heartbeat_age_s()
    if age_s is None or abs(age_s) > STALE_S:
        said = "has given no sign of life" if age_s is None else f"gave no sign of life for {age_s:.0f} s"
        if age_s is not None and age_s < 0:
            said = f"has a heartbeat that is {-age_s:.0f} s ahead of the file server's clock"
        raise RendezvousStaleError(
            f"Workspace {record.workspace_id} on {record.node} {said}.",
            evidence=f"Its record says {record.state}; see {directory.node_log}.",
            remedy="Its node or job has probably died: start a new one.",
        )


__all__ = ["END_TIMEOUT_S", "Closable", "Link", "as_error", "close_quietly", "require_running"]
