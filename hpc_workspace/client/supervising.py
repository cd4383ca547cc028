"""The shell text that a command is wrapped in for OpenHands' server (1.58), which supervises too little itself.

It runs `/bin/sh -c TEXT`, waits for the end of stdout, decodes it in pieces of 8 KiB, takes whole seconds, and ends a
process group at most. So the text lets the command write to files, in a directory of the container's own `/tmp`:

    ID.out ID.err    what it has written, exact to the byte, for as long as the container lives
    ID.pid           the shell that runs TEXT
    ID.end           how it ended: its exit code, -N for signal N, `T` for a time-out, `N` if it could not be started
    ID.sig           what that shell said of a signal that ended the command
    ID.late          its time ran out

Everything that the command starts carries the mark ID in its environment; by that it is found and ended. Plain POSIX
shell: dash, bash and busybox do it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

FOLDER = "/tmp/.hpc-workspace"  # noqa: S108 - inside the container, whose /tmp is its own scratch
MARK_NAME = "HPC_WORKSPACE_COMMAND"
# So much is told with the answer; of what is longer, the file is read.
TOLD_BYTES = 64 * 1024
TIMED_OUT, NOT_STARTED, UNKNOWN = "T", "N", 3

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Files of the image may be called as these are: `command` and absolute paths would not help against that either.
_END_ALL = f"""
marked() {{ grep -l "{MARK_NAME}=$i" /proc/[0-9]*/environ 2>/dev/null; }}
signal_all() {{ for p in $(marked); do p=${{p#/proc/}}; kill "-$1" "${{p%/environ}}" 2>/dev/null; done; }}
end_all() {{
  signal_all TERM; n=0
  while [ -n "$(marked)" ] && [ $n -lt 60 ]; do
    n=$((n + 1)); [ $n -le 20 ] || signal_all KILL; sleep 0.05
  done
}}"""


def place(command_id: str, kind: str) -> str:
    """One of a command's files: out, err, end or pid."""
    return f"{FOLDER}/{command_id}.{kind}"


def supervised(
    command: str,
    *,
    command_id: str,
    cwd: str,
    env: Mapping[str, str],
    timer_s: float | None = None,
    is_told: bool = False,
    spent: Iterable[str] = (),
) -> str:
    """`command` in `cwd`, with `env` and an empty stdin, in bash where there is one.

    Args:
        timer_s: ends it after so many seconds; None: nobody does, or the server.
        is_told: the first `TOLD_BYTES` and one of its output are printed at the end, and `"\\nID CODE\\n"` on stderr.
        spent: ids of earlier commands whose files nobody wants any more.

    Raises:
        ValueError: no shell can set a variable of such a name.
    """
    for name in env:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"env: {name!r} is not a variable name that a shell can set")
    settings = "".join(f"export {name}={shlex.quote(value)}; " for name, value in env.items())
    say = 'echo "\n$i $e" >&2' if is_told else ":"
    parts = [
        f"i={command_id}; f={FOLDER}/$i; [ -d {FOLDER} ] || mkdir -m 700 -p {FOLDER}; e={NOT_STARTED}",
        f'cd -- {shlex.quote(cwd)} 2>/dev/null && true >"$f.out" && true >"$f.err" && echo $$ >"$f.pid" || '
        f'{{ echo $e >"$f.end"; {say}; exit 1; }}',
        "" if timer_s is None else _timer(timer_s),
        f"c={shlex.quote(command)}; if command -v bash >/dev/null 2>&1; then s=bash; else s=sh; fi",
        # Handlers, not "ignore": that the command would inherit. The shell's own end comes after the command's.
        "trap late=1 TERM; trap : INT",
        f'{{ ({settings}{MARK_NAME}=$i exec "$s" -c "$c" </dev/null >"$f.out" 2>"$f.err"); e=$?; }} 2>"$f.sig"',
        '[ -z "$late" ] || { trap - TERM; kill -TERM $$; }',
        # A shell tells 137 from signal 9 only by what it prints, and prints nothing of SIGINT and SIGPIPE.
        '[ "$e" -gt 128 ] && [ -s "$f.sig" ] && e=-$((e - 128))',
        "" if timer_s is None else f'if [ -e "$f.late" ]; then wait $k; e={TIMED_OUT}; else kill $k; fi',
        'echo "$e" >"$f.end"',
        f'[ -s "$f.err" ] && head -c {TOLD_BYTES + 1} "$f.err" >&2' if is_told else "",
        say,
        _forgetting(spent),
        # In the place of this shell: one process less.
        f'[ -s "$f.out" ] && exec head -c {TOLD_BYTES + 1} "$f.out"' if is_told else "",
        "exit 0",
    ]
    return "\n".join(part for part in parts if part)


def _timer(timer_s: float) -> str:
    return (
        f"{_END_ALL}\n( trap 'kill $t; exit' TERM; sleep {timer_s:.6f} & t=$!; wait $t; "
        'true >"$f.late"; end_all ) >/dev/null 2>&1 & k=$!'
    )


def _forgetting(spent: Iterable[str]) -> str:
    globs = " ".join(f"{command_id}.*" for command_id in spent)
    return f"(cd {FOLDER} && rm -f {globs}) >/dev/null 2>&1 &" if globs else ""


def ending(command_id: str) -> str:
    """Text that ends a command and all that it started, and returns then; status `UNKNOWN`: it never began."""
    return (
        f'i={command_id}; f={FOLDER}/$i; [ -e "$f.out" ] || exit {UNKNOWN}\n{_END_ALL}\n'
        '[ -e "$f.end" ] || end_all; n=0\n'
        f'while [ ! -e "$f.end" ] && {_is_supervised()} && [ $n -lt 40 ]; do n=$((n + 1)); sleep 0.05; done\nexit 0'
    )


def asking(command_id: str) -> str:
    """Text whose status is 0 if a command has said how it ended, or still may; 1 if nobody is left who could."""
    return f'f={FOLDER}/{command_id}; [ -e "$f.end" ] || {_is_supervised()} || [ -e "$f.end" ]'


def _is_supervised() -> str:
    return '{ read -r p <"$f.pid" && kill -0 "$p"; } 2>/dev/null'
