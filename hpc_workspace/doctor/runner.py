"""Runs checks beside each other; a broken or stuck one is a finding and stops no other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from hpc_workspace import clock
from hpc_workspace.doctor.finding import Check, Finding, Verdict
from hpc_workspace.doctor.site import Site

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0

_Value = TypeVar("_Value")


class Bounded(Generic[_Value]):
    """A call in a thread of its own, which is left behind if it does not come back.

    Args:
        name: for the log.
        call: whatever it raises becomes a value.
        otherwise: the value in the place of one that did not come, from the reason and what to do.
    """

    def __init__(self, name: str, call: Callable[[], _Value], otherwise: Callable[[str, str], _Value]) -> None:
        self._name = name
        self._call = call
        self._otherwise = otherwise
        self._values: list[_Value] = []
        self._thread = threading.Thread(target=self._run, name=f"doctor {name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._values.append(self._call())
        except Exception as error:
            # Whatever a check did not think of must not stop the others: the one place for so broad a net.
            log.debug("%s is broken", self._name, exc_info=True)
            self._values.append(self._otherwise(f"the check itself broke: {type(error).__name__}: {error}", _REPORT))

    def wait(self, deadline: clock.Deadline) -> _Value:
        """What the call gave, or what stands for it."""
        self._thread.join(deadline.left_s)
        if not self._values:
            return self._otherwise(f"no answer within {deadline.timeout_s:g} s", _STUCK)
        return self._values[0]


_REPORT = "That is a mistake of hpc-workspace's: please report it, with the output of `hpc-workspace --debug doctor`."
_STUCK = "Something it looked at hangs, a file system or a network: look for it with `df`."


def run_checks(checks: Sequence[Check], site: Site, *, node: str = "", timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Every check's finding, in order; those that have nothing to look at are left out.

    Args:
        node: the compute node that this is; empty: where the doctor was asked.
        timeout_s: for all of them together; they run at the same time.
    """
    deadline = clock.Deadline(timeout_s)
    running = [(check, _start(check, site)) for check in checks]
    verdicts = [(check, bounded.wait(deadline)) for check, bounded in running]
    return [Finding.of(check.name, check.why, verdict, node) for check, verdict in verdicts if verdict is not None]


def _start(check: Check, site: Site) -> Bounded[Verdict | None]:
    return Bounded(check.name, lambda: check.look(site), lambda found, remedy: Verdict("fail", found, remedy))
