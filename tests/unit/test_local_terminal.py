"""The terminal that a person sits at."""

from __future__ import annotations

import os
import pty
import signal
import termios
from collections.abc import Iterator

import pytest

from hpc_workspace.cli.local_terminal import DEFAULT_SIZE, find_size, handling, raw_mode


@pytest.fixture
def terminal() -> Iterator[int]:
    ours, theirs = pty.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


def test_the_size_is_that_of_the_first_terminal_that_knows_its_own(terminal: int) -> None:
    reading, writing = os.pipe()
    assert find_size(reading, terminal) == DEFAULT_SIZE  # one that was given none
    termios.tcsetwinsize(terminal, (30, 70))
    assert find_size(reading, terminal) == (30, 70)
    os.close(reading)
    os.close(writing)


def test_raw_mode_is_undone_by_an_error_too(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    with pytest.raises(KeyError), raw_mode(terminal):
        modes = termios.tcgetattr(terminal)[3]
        assert not modes & (termios.ISIG | termios.ICANON | termios.ECHO)
        raise KeyError
    assert termios.tcgetattr(terminal) == before


def test_after_a_stop_the_terminal_is_raw_again(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    with raw_mode(terminal):
        termios.tcsetattr(terminal, termios.TCSANOW, before)  # as a shell does meanwhile
        signal.raise_signal(signal.SIGCONT)
        assert not termios.tcgetattr(terminal)[3] & termios.ICANON
    assert signal.getsignal(signal.SIGCONT) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling(signal.SIGHUP, lambda number, frame: None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
