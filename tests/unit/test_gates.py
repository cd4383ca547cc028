"""Start gates: so many at once, given back by the kernel when their holder dies."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys

import pytest

from hpc_workspace.node.gates import Gate

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the node side is Linux")

HOLD = """
import sys
from hpc_workspace.node.gates import Gate
gate = Gate(sys.argv[1], 1)
print(gate.try_acquire(), flush=True)
sys.stdin.read()
"""


def test_no_more_than_its_slots_pass_a_gate_and_a_slot_given_back_is_free() -> None:
    name = secrets.token_hex(8)
    first, second, third = Gate(name, 2), Gate(name, 2), Gate(name, 2)
    assert [gate.try_acquire() for gate in (first, second, third)] == [True, True, False]
    assert first.try_acquire()  # it is held already
    first.release()
    assert third.try_acquire()
    assert repr(third) == "<Gate [2 slots, held]>"
    second.release()
    third.release()


def test_gates_of_different_names_do_not_know_each_other() -> None:
    one, other = Gate(secrets.token_hex(8), 1), Gate(secrets.token_hex(8), 1)
    assert one.try_acquire()
    assert other.try_acquire()
    one.release()
    other.release()


def test_a_slot_is_free_once_its_holder_was_killed() -> None:
    name = secrets.token_hex(8)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "True\n"
    gate = Gate(name, 1)
    assert not gate.try_acquire()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert gate.try_acquire()
    gate.release()
