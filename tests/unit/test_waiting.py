"""What a command shows while it waits: a line that changes on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

RUN = [sys.executable, "-m", "hpc_workspace.cli", "run", "--runtime", "process", "--", "echo said"]


def test_on_a_terminal_one_line_with_a_clock_that_is_gone_when_it_is_over() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(RUN, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:
        assert process.wait(30) == 0  # the terminal's other side is closed
    os.close(ours)
    assert process.stdout is not None
    assert process.stdout.read() == b"said\n"
    assert b"starting on this machine" in shown
    assert b"0:00:0" in shown
    assert shown.rstrip().endswith(b"\x1b[2K")  # erased


def test_elsewhere_plain_lines() -> None:
    ended = subprocess.run(RUN, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout == "said\n"
    assert "starting on this machine" in ended.stderr
    assert "\x1b" not in ended.stderr
