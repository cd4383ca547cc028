"""`python -m hpc_workspace.node.bridge`: connects streams that come in on stdin with listeners of this node.

The far end of one `srun` or `ssh`: see `hpc_workspace.mux`. It speaks frames on stdin and stdout and nothing else;
words for a person go to stderr. It ends when stdin does, and leaves nothing. It knows no secret: client and door prove
themselves to each other through it. It connects this user's Unix sockets, and ports of 127.0.0.1.

One thread, and few imports: whoever waits for it waits for its start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import stat
import struct
import sys

from hpc_workspace import clock
from hpc_workspace.mux.frames import PAYLOAD_MAX_BYTES, MuxError
from hpc_workspace.mux.session import Channel, Session

_READ_BYTES = 256 * 1024
# A client that lives says something every 15 s; one that was stopped for a while still finds its streams.
_ORPHANED_AFTER_S = 600.0


class TargetError(Exception):
    """A target that is not connected, whoever asks."""


def connect_target(target: str) -> tuple[socket.socket, bool]:
    """A non-blocking socket to `unix:/path` or `tcp:port`, and whether it is connected already.

    Raises:
        TargetError: it is neither this user's Unix socket nor a port.
        OSError: nobody listens there.
    """
    kind, _, where = target.partition(":")
    if kind == "unix" and where.startswith("/"):
        return _connect_unix(where), True
    if kind == "tcp" and where.isascii() and where.isdigit() and 0 < int(where[:6]) < 65536:
        return _connect_tcp(int(where))
    raise TargetError("is neither a Unix socket nor a port")


def _connect_unix(path: str) -> socket.socket:
    status = os.lstat(path)
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.getuid():
        raise TargetError("is not a Unix socket of this user's")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        connection.connect(path)  # at once, or EAGAIN where the listener's queue is full: unix(7)
        # unix(7), SO_PEERCRED: of whoever called listen(2); struct ucred is pid, uid, gid.
        _, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            raise TargetError("is another user's now")
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_tcp(port: int) -> tuple[socket.socket, bool]:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = connection.connect_ex(("127.0.0.1", port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except BaseException:
        connection.close()
        raise
    return connection, code == 0


class _Relay:
    """One stream and its connection to the target."""

    def __init__(self, session: Session, channel: Channel, connection: socket.socket, is_connected: bool) -> None:
        self.channel = channel
        self.fd = connection.fileno()
        self._session = session
        self._connection = connection
        self._is_connected = is_connected
        self._unsent = memoryview(b"")
        self._has_read_all = False
        self._has_sent_all = False
        self._fault = ""
        self.is_over = False
        if is_connected:
            session.accept(channel)

    @property
    def mask(self) -> int:
        """What of poll(2) there is to wait for; 0: nothing."""
        if self.is_over:
            return 0
        wants_in = self._is_connected and not self._has_read_all and self.channel.room_bytes >= PAYLOAD_MAX_BYTES
        wants_out = not self._is_connected or bool(self._unsent)
        return (select.POLLIN if wants_in else 0) | (select.POLLOUT if wants_out else 0)

    def on_ready(self, events: int) -> None:
        """poll(2) says that something can be done with the connection."""
        if not self._is_connected:
            if code := self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._session.refuse(self.channel, f"{self.channel.target}: {os.strerror(code)}")
                self.close()
                return
            self._is_connected = True
            self._session.accept(self.channel)
        elif events & ~select.POLLOUT:
            self._receive()
        self.send()

    def _receive(self) -> None:
        if self._has_read_all or self.channel.room_bytes < PAYLOAD_MAX_BYTES:
            return
        try:
            data = self._connection.recv(PAYLOAD_MAX_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fault = self._fault or os.strerror(error.errno or 0)
            data = b""
        if data:
            self._session.send(self.channel, data)
            return
        self._has_read_all = True
        if self._fault:
            self._session.reset(self.channel, self._fault)
        else:
            self._session.end(self.channel)

    def send(self) -> None:
        """Pass on what has come for the target, as far as it takes it, then the end if that has come too."""
        if self.is_over or not self._is_connected:
            if self.channel.broken is not None:
                self.close()
            return
        with contextlib.suppress(BlockingIOError):
            while self._unsent or self.channel.has_bytes:
                self._unsent = self._unsent or memoryview(self._session.take(self.channel, _READ_BYTES))
                self._unsent = self._unsent[self._push(self._unsent) :]
            self._send_end()

    def _push(self, data: memoryview) -> int:
        """Raises BlockingIOError."""
        if not self._fault:
            try:
                return self._connection.send(data)
            except BlockingIOError:
                raise
            except OSError as error:
                # It listens no more, but may have said why: that is still to be read.
                self._fault = os.strerror(error.errno or 0)
        return len(data)

    def _send_end(self) -> None:
        if self.channel.broken is not None or (self._fault and self._has_read_all):
            self.close()
        elif self.channel.ended and not self._has_sent_all:
            self._has_sent_all = True
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)
        if self._has_sent_all and self._has_read_all:
            self.close()

    def close(self) -> None:
        self.is_over = True
        self._connection.close()


class Bridge:
    """Speaks on two descriptors, not the same number twice, until the first ends."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._changed: dict[int, Channel] = {}
        self._session = Session(is_opener=False, on_change=self._on_change)
        self._relays: dict[int, _Relay] = {}
        self._by_fd: dict[int, _Relay] = {}
        self._unwritten = memoryview(b"")
        self._poll = select.poll()
        self._masks: dict[int, int] = {}
        self._orphaned = clock.Deadline(_ORPHANED_AFTER_S)

    def run(self) -> None:
        """Relay until there is nobody to do it for.

        Raises:
            MuxError: the client does not speak this.
            OSError: stdin or stdout broke.
        """
        for fd in (self._read_fd, self._write_fd):
            os.set_blocking(fd, False)
        self._watch(self._read_fd, select.POLLIN)
        while True:
            self._write()
            while self._changed:  # there is room for more to be read
                self._serve_changed()
                self._write()
            self._watch(self._write_fd, select.POLLOUT if self._unwritten else 0)
            for fd, events in self._poll.poll(self._orphaned.left_s * 1000):
                if fd == self._read_fd:
                    if not self._read():
                        return
                elif (relay := self._by_fd.get(fd)) is not None:
                    relay.on_ready(events)
                    self._settle(relay)
            if self._orphaned.is_over:
                return
            self._serve_changed()

    def _on_change(self, channel: Channel) -> None:
        self._changed[channel.number] = channel

    def _read(self) -> bool:
        """Take in what the client sent. Returns whether it is still there."""
        try:
            data = os.read(self._read_fd, _READ_BYTES)
        except BlockingIOError:
            return True
        self._orphaned = clock.Deadline(_ORPHANED_AFTER_S)
        self._session.feed(data)
        return bool(data)

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._unwritten or self._session.has_output:
                self._unwritten = self._unwritten or memoryview(self._session.output())
                self._unwritten = self._unwritten[os.write(self._write_fd, self._unwritten) :]

    def _serve_changed(self) -> None:
        while self._changed:
            number, channel = self._changed.popitem()
            relay = self._relays.get(number) or self._open(channel)
            if relay is not None:
                relay.send()
                self._settle(relay)

    def _open(self, channel: Channel) -> _Relay | None:
        """Connect a channel that is new; None if it is over."""
        if channel.opened or channel.refusal is not None or channel.broken is not None:
            return None
        try:
            connection, is_connected = connect_target(channel.target)
        except TargetError as error:
            self._session.refuse(channel, f"{channel.target} {error}")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            self._session.refuse(channel, f"{channel.target}: {getattr(error, 'strerror', None) or error}")
        else:
            relay = self._relays[channel.number] = _Relay(self._session, channel, connection, is_connected)
            self._by_fd[relay.fd] = relay
            return relay
        return None

    def _settle(self, relay: _Relay) -> None:
        self._watch(relay.fd, relay.mask)
        if relay.is_over and self._relays.pop(relay.channel.number, None) is not None:
            del self._by_fd[relay.fd]

    def _watch(self, fd: int, mask: int) -> None:
        # poll(2) tells of an end whether it is asked or not: what is waiting for nothing is not asked about at all.
        if mask == self._masks.get(fd, 0):
            return
        if mask:
            self._poll.register(fd, mask)
            self._masks[fd] = mask
        else:
            self._poll.unregister(fd)
            del self._masks[fd]


def main() -> int:
    """Bridge stdin and stdout. Returns the exit code: 0 if the client left."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        Bridge(0, 1).run()
    except (MuxError, OSError) as error:
        print(f"hpc-workspace bridge: {error}", file=sys.stderr)
        return 1
    return 0


def run_and_exit() -> None:
    """Run to the end, and be gone: taking the interpreter apart would only keep who waits for that waiting."""
    code = main()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_and_exit()
