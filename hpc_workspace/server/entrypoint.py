"""The environment that an image's ENTRYPOINT sets, for the commands of a server that `apptainer exec` started.

`exec` gives what the image's ENV says, and does not run its entrypoint. Where that is a script of the usual kind, which
sets things up and hands over to its arguments (`exec "$@"`), it is run once with arguments that write the environment
to a file. What it starts in the background stays, as with Docker.

Deliberately not run: an entrypoint that is a program, or a script that starts an application of its own.

Source: Docker's best practices for ENTRYPOINT; Apptainer 1.4.5, internal/pkg/build/sources/conveyorPacker_oci.go
(insertRunScript) and internal/pkg/util/shell/escape.go.
"""

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hpc_workspace.server.children import attach, spawn, watch_exit
from hpc_workspace.server.sessions import Family, end_family
from hpc_workspace.server.settings import parse_environment

TIMEOUT_S = 10.0
_SCRIPT_MAX_BYTES = 256 * 1024
_SAID_MAX_BYTES = 4096
_OCI_LINE = "\nOCI_ENTRYPOINT='"
# Programs that start their arguments and wait, each with its options that take a value.
# Source: tini 0.19, dumb-init 1.2.5, catatonit 0.2, each by --help; docker-init is tini.
_INITS = {
    "tini": ("-e", "-p"),
    "tini-static": ("-e", "-p"),
    "docker-init": ("-e", "-p"),
    "dumb-init": ("-r", "--rewrite"),
    "catatonit": (),
}
_SHELLS = ("ash", "bash", "dash", "sh")
_SHELL_OPTION = r"-[eilux]+|--login"
_ARGUMENTS = r"\"?\$(?:[@*]|\{[@*]\})\"?"
_VALUE = rf"(?!{_ARGUMENTS})[^\s-]\S*"
_OPTIONS = rf"(?:[ \t]+(?:--|-(?!-\s)\S+(?:[ \t]+{_VALUE})?|\w+=\S*))*"
# Programs that change something, then become their arguments, with nothing but options before these.
_WRAPPER = (
    rf"(?:\S*/)?(?:(?:gosu|su-exec)[ \t]+{_VALUE}|(?:conda|mamba|micromamba|pipenv|pixi|poetry|uv)[ \t]+run|"
    r"opam[ \t]+exec|catatonit|chpst|dbus-run-session|dumb-init|env|ionice|nice|setpriv|stdbuf|sudo|tini|xvfb-run)"
    rf"{_OPTIONS}[ \t]+"
)
# Texts, compiled when there is a script to look at: most images have none.
_EXEC_OF_ARGUMENTS = rf"(?m)^(?![ \t]*#).*\bexec[ \t]+(?:{_WRAPPER})*{_ARGUMENTS}"
_ARGUMENTS_ALONE = rf"[ \t]*{_ARGUMENTS}[ \t]*"
# `"$@"` on a line of its own may be in a function that retries or logs; near the end of a script it is its last word.
_LAST_LINES = 4
# What a shell sets by itself: of no meaning to the next one.
_SHELLS_OWN = ("_", "OLDPWD", "PWD", "SHLVL")
_OURS = "HPC_WORKSPACE_"
_CONTROL = r"[\x00-\x1f\x7f]"


class EntrypointError(Exception):
    """The entrypoint did not hand over; the message says how it went."""


def find_entrypoint(runscript: Path, search_path: str) -> list[str]:
    """The words that start the image's entrypoint script, up to its arguments; empty where the image has none to run.

    Args:
        runscript: Apptainer's, made from the image's configuration.
        search_path: the image's PATH.
    """
    words = _without_inits(_oci_words(_read_script(runscript)))
    shell = _leading_shell(words)
    script = _find_script(words[len(shell)], search_path) if len(words) > len(shell) else None
    return words if script is not None and _hands_over(_read_script(script)) else []


def _oci_words(runscript: str) -> list[str]:
    """The words of OCI_ENTRYPOINT='"word" "word"': shell words in shell quotes. Empty where it is no OCI image's."""
    _, found, rest = runscript.partition(_OCI_LINE)
    if not found:
        return []
    lexer = shlex.shlex("'" + rest, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = shlex.split(lexer.get_token() or "")
    except ValueError:  # quotes that do not close
        return []
    # Inside double quotes shlex undoes \\ and \" alone.
    return [re.sub(r"\\([$`])", r"\1", word) for word in words]


def _without_inits(words: list[str]) -> list[str]:
    while words and (valued := _INITS.get(os.path.basename(words[0]))) is not None:  # noqa: PTH119 - a word, no path yet
        words = words[1:]
        while words and words[0].startswith("-"):
            option, words = words[0], words[1:]
            if option == "--":
                break
            words = words[1:] if option in valued else words
    return words


def _leading_shell(words: list[str]) -> list[str]:
    """A shell and its options before the script; empty where the script stands alone. `sh -c` takes no arguments."""
    if not words or os.path.basename(words[0]) not in _SHELLS:  # noqa: PTH119 - as above
        return []
    count = 1
    while count < len(words) and re.fullmatch(_SHELL_OPTION, words[count]):
        count += 1
    return words[:count]


def _find_script(word: str, search_path: str) -> Path | None:
    # Apptainer does not keep WORKDIR, so that nobody knows where a relative path would begin.
    found = word if word.startswith("/") else None if "/" in word else shutil.which(word, path=search_path)
    return Path(found) if found else None


def _read_script(path: Path) -> str:
    """The text of a script, as far as one goes; empty where there is none."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            head = file.read(2)
            return (head + file.read(_SCRIPT_MAX_BYTES)).decode("utf-8", "replace") if head == b"#!" else ""
    except OSError:
        return ""


def _hands_over(script: str) -> bool:
    """Whether a script becomes, or at its end runs, what its arguments say."""
    text = script.replace("\\\n", " ")
    if re.search(_EXEC_OF_ARGUMENTS, text):
        return True
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return any(re.fullmatch(_ARGUMENTS_ALONE, line) for line in lines[-_LAST_LINES:])


async def environment_after(
    words: Sequence[str],
    base: Mapping[str, str],
    *,
    cwd: str,
    folder: Path,
    dump_argv: Sequence[str],
    timeout_s: float = TIMEOUT_S,
) -> dict[str, str]:
    """`base` as the entrypoint changes it. Where it fails, `base`, and a line on stderr that says why.

    Args:
        words: the entrypoint, as `find_entrypoint` gives it.
        folder: where a private file may lie for as long as it runs; made if missing.
        dump_argv: starts `dump_environment`, up to its own argument.

    What a shell sets by itself, and what is ours, stays as it is in `base`.
    """
    try:
        with _private_file(folder) as path:
            argv = [*words, *dump_argv, str(path)]
            entries = await _run(argv, env=base, cwd=cwd, dump=path, timeout_s=timeout_s)
    except (EntrypointError, OSError) as error:
        what = f"the image's entrypoint {shlex.join(words)} {error}"
        print(f"hpc_workspace.server: {_one_line(what)}; commands go without what it sets", file=sys.stderr, flush=True)
        return dict(base)
    taken = {name: value for name, value in parse_environment(entries).items() if not _is_kept(name)}
    return taken | {name: value for name, value in base.items() if _is_kept(name)}


def _is_kept(name: str) -> bool:
    return name in _SHELLS_OWN or name.startswith(_OURS)


@contextlib.contextmanager
def _private_file(folder: Path) -> Iterator[Path]:
    """An empty 0600 file: the environment may hold secrets."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f".environment-{os.urandom(8).hex()}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


async def _run(argv: Sequence[str], *, env: Mapping[str, str], cwd: str, dump: Path, timeout_s: float) -> bytes:
    """Run the entrypoint until it ends; returns what it left in the file `dump`.

    Raises:
        EntrypointError: it can't be started, ended without handing over, or took too long. Nothing of it runs.
        OSError: the file can't be read.
    """
    try:
        popen = spawn(argv, cwd=cwd if Path(cwd).is_dir() else "/", env=env)
    except (OSError, ValueError) as error:
        raise EntrypointError(f"can't be started: {error}") from error
    said = bytearray()

    def keep(data: bytes) -> None:
        said.extend(data)
        del said[:-_SAID_MAX_BYTES]

    readers = attach(popen, keep, keep)
    entries = None
    try:
        async with asyncio.timeout(timeout_s):
            await watch_exit(popen.pid)
        entries = _whole_dump(dump.read_bytes())
    except TimeoutError:
        raise EntrypointError(f"did not hand over within {timeout_s:g} s, and was ended") from None
    finally:
        if entries is None:
            await end_family(Family(popen.pid), grace_s=0)  # while its number is taken: the leader is not reaped yet
        for reader in readers:
            reader.drain_present()
            reader.discard()
        code = popen.wait()
    if entries is None:
        raise EntrypointError(f"ended with exit code {code} and did not hand over: {_last_line(said)}")
    return entries


def _whole_dump(data: bytes) -> bytes | None:
    """The entries; None where the last, empty one is missing."""
    return data[:-1] if data == b"\0" or data.endswith(b"\0\0") else None


def _last_line(said: bytearray) -> str:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][-200:] if lines else "it said nothing"


def _one_line(text: str) -> str:
    return re.sub(_CONTROL, "?", text)
