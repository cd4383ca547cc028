"""Starting programs and reading their pipes on the event loop. The only module of the server that starts processes.

asyncio's own subprocess support reaps a child by itself and reads ahead without bound; here the exit is noticed without
reaping (so that the session's number stays taken while it is being ended), and a reader can be paused.
"""

import array
import asyncio
import contextlib
import fcntl
import os
import subprocess
import termios
import threading
from collections.abc import Callable, Mapping, Sequence

_READ_BYTES = 64 * 1024


def spawn(argv: Sequence[str], *, cwd: str, env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a program as leader of its own session, stdin empty, stdout and stderr on separate pipes, umask 022.

    Raises:
        OSError: The program or the directory can't be used.
        ValueError: An argument holds a NUL or can't be encoded.
    """
    return subprocess.Popen(
        argv,
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        umask=0o022,
        bufsize=0,
    )


def watch_exit(pid: int) -> "asyncio.Future[None]":
    """A future done when the child has exited; it is not reaped."""
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[None] = loop.create_future()
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):  # macOS, kernels before 5.3 (RHEL 8)
        threading.Thread(target=_wait_in_thread, args=(pid, loop, exited), daemon=True).start()
        return exited

    def on_exit() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        _settle(exited)

    loop.add_reader(fd, on_exit)
    return exited


def _wait_in_thread(pid: int, loop: asyncio.AbstractEventLoop, exited: "asyncio.Future[None]") -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_settle, exited)


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class PipeReader:
    """Reads one pipe of a child until its end, handing every chunk to `sink`; can be paused, then discards.

    Guarantees: after `discard`, the pipe stays open and is emptied, so that a background child that still writes to
    it is neither blocked nor killed by SIGPIPE.
    """

    def __init__(self, fd: int, sink: Callable[[bytes], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = os.dup(fd)
        self._sink = sink
        self._paused = False
        self.ended: asyncio.Future[None] = self._loop.create_future()
        os.set_blocking(self._fd, False)
        self._loop.add_reader(self._fd, self._on_readable)

    def pause(self) -> None:
        """Stop reading: the child blocks once the pipe is full."""
        if not self._paused and not self.ended.done():
            self._paused = True
            self._loop.remove_reader(self._fd)

    def resume(self) -> None:
        """Read again after `pause`."""
        if self._paused and not self.ended.done():
            self._paused = False
            self._loop.add_reader(self._fd, self._on_readable)

    def drain_present(self) -> None:
        """Read what is in the pipe at this moment, and no more, whether paused or not."""
        if self.ended.done():
            return
        waiting = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.FIONREAD, waiting)
        left = waiting[0]
        while left > 0 and not self.ended.done():
            left -= self._read_once(min(left, _READ_BYTES))

    def discard(self) -> None:
        """From now on throw away what comes, until the last writer has gone."""
        self._sink = _ignore
        self.resume()

    def _on_readable(self) -> None:
        self._read_once(_READ_BYTES)

    def _read_once(self, limit: int) -> int:
        try:
            data = os.read(self._fd, limit)
        except BlockingIOError:
            return limit  # nothing there after all; a caller that counts down is done
        except OSError:
            data = b""
        if data:
            self._sink(data)
        else:
            self._end()
        return len(data)

    def _end(self) -> None:
        if not self._paused:
            self._loop.remove_reader(self._fd)
        os.close(self._fd)
        _settle(self.ended)


def _ignore(_: bytes) -> None:
    """The sink of output that comes after its command has ended."""


async def run_program(
    argv: Sequence[str], *, cwd: str, env: Mapping[str, str], timeout_s: float
) -> tuple[int, bytes, bytes]:
    """Run a helper program to its end: returncode, stdout, stderr.

    Raises:
        OSError: It can't be started (FileNotFoundError: it is not installed).
        TimeoutError: It did not end in time; it has been killed.
    """
    out, err = bytearray(), bytearray()
    popen = spawn(argv, cwd=cwd, env=env)
    readers = attach(popen, out.extend, err.extend)
    exited = watch_exit(popen.pid)
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(exited, *(reader.ended for reader in readers))
    finally:
        if popen.returncode is None and not exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, 9)
        for reader in readers:
            reader.discard()
        popen.wait()
    return popen.returncode, bytes(out), bytes(err)


def attach(
    popen: "subprocess.Popen[bytes]", on_stdout: Callable[[bytes], None], on_stderr: Callable[[bytes], None]
) -> tuple[PipeReader, PipeReader]:
    """Readers for both pipes; Popen's own file objects are closed."""
    if popen.stdout is None or popen.stderr is None:
        raise ValueError("the program was started without pipes")
    readers = PipeReader(popen.stdout.fileno(), on_stdout), PipeReader(popen.stderr.fileno(), on_stderr)
    popen.stdout.close()
    popen.stderr.close()
    return readers
