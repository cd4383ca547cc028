"""Claims about the image's ENTRYPOINT: which are run, and what commands then find in their environment."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from hpc_workspace.server import dump_environment
from hpc_workspace.server.entrypoint import environment_after, find_entrypoint
from tests.unit.server.running import eventually, is_alive

HANDS_OVER = '#!/bin/sh\nexport X=1\nexec "$@"\n'
DUMP_ARGV = [sys.executable, "-I", "-S", "-B", dump_environment.__file__]


def _script(folder: Path, text: str, name: str = "entrypoint.sh") -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def _runscript(folder: Path, oci_entrypoint: str) -> Path:
    """As Apptainer 1.4.5 writes it from an OCI image, up to what is looked at."""
    return _script(
        folder, f"#!/bin/sh\nOCI_ENTRYPOINT='{oci_entrypoint}'\nOCI_CMD='\"sh\"'\n\nexec \"$@\"\n", "runscript"
    )


def _after(script: Path, base: dict[str, str], timeout_s: float = 10.0) -> dict[str, str]:
    """The environment after the script, run in its own directory."""
    folder = script.parent
    return asyncio.run(
        environment_after(
            [str(script)], base, cwd=str(folder), folder=folder / "spool", dump_argv=DUMP_ARGV, timeout_s=timeout_s
        )
    )


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("", ["{script}"]),
        ('"tini" "--" ', ["{script}"]),
        ('"/usr/bin/tini" "-g" "-p" "SIGTERM" "-e" "143" "--" ', ["{script}"]),
        ('"dumb-init" "--rewrite" "15:2" ', ["{script}"]),
        ('"catatonit" "-g" "--" ', ["{script}"]),
        ('"/bin/bash" ', ["/bin/bash", "{script}"]),
        ('"tini" "--" "bash" "-l" ', ["bash", "-l", "{script}"]),
    ],
)
def test_a_script_is_found_behind_inits_and_shells(tmp_path: Path, before: str, words: list[str]) -> None:
    script = _script(tmp_path, HANDS_OVER)
    found = find_entrypoint(_runscript(tmp_path, f'{before}"{script}"'), "/bin")
    assert found == [word.format(script=script) for word in words]


def test_a_script_is_found_on_the_image_s_path(tmp_path: Path) -> None:
    _script(tmp_path, HANDS_OVER, "docker-entrypoint.sh")
    runscript = _runscript(tmp_path, '"docker-entrypoint.sh"')
    assert find_entrypoint(runscript, f"/nowhere:{tmp_path}") == ["docker-entrypoint.sh"]
    assert find_entrypoint(runscript, "/nowhere") == []


def test_its_own_arguments_are_kept_whatever_their_quotes(tmp_path: Path) -> None:
    script = _script(tmp_path, HANDS_OVER)
    # ENTRYPOINT ["…", "a b", "it's", "$x", "`y`", "\"z\"", "back\\slash"], quoted as by Apptainer 1.4.5.
    quoted = r""""a b" "it'"'"'s" "\$x" "\`y\`" "\"z\"" "back\\slash" """.strip()
    found = find_entrypoint(_runscript(tmp_path, f'"{script}" {quoted}'), "/bin")
    assert found == [str(script), "a b", "it's", "$x", "`y`", '"z"', "back\\slash"]


@pytest.mark.parametrize(
    "oci_entrypoint",
    [
        "",
        '"tini" "--"',  # tiny.sif
        '"/bin/sh"',  # busybox.sif
        '"tini" "--" "/agent-server/.venv/bin/python" "-m" "openhands.agent_server"',  # agent-server.sif
        '"/bin/sh" "-c" "{script}"',  # the script gets no arguments
        '"python3" "{script}"',
        '"./entrypoint.sh"',
        '"/nowhere/entrypoint.sh"',
        '"/dev/zero"',
        '"{script}',  # a quote that does not close
    ],
)
def test_anything_else_is_not_run(tmp_path: Path, oci_entrypoint: str) -> None:
    script = _script(tmp_path, HANDS_OVER)
    runscript = _runscript(tmp_path, oci_entrypoint.format(script=script))
    assert find_entrypoint(runscript, f"{tmp_path}:/usr/bin:/bin") == []


def test_an_image_that_was_not_made_from_an_oci_image_has_none(tmp_path: Path) -> None:
    assert find_entrypoint(tmp_path / "absent", "/bin") == []
    assert find_entrypoint(_script(tmp_path, '#!/bin/sh\nexec "$@"\n', "runscript"), "/bin") == []


@pytest.mark.parametrize(
    "end",
    [
        'exec "$@"',
        "exec $@",
        'exec "${@}"',
        '[ $# -gt 0 ] && exec "$@"',
        'if [ "$1" = serve ]; then\n  exec gunicorn app\nelse\n  exec "$@"\nfi',
        'exec gosu "$USER" "$@"',
        'exec tini -s -- "$@"',
        'exec env -u X A=b nice -n 10 "$@"',
        'exec micromamba run -n base "$@"',
        'exec \\\n  "$@"',
        '"$@"',
        '"$@"\nexit $?',
    ],
)
def test_a_script_that_hands_over_is_known_by_its_end(tmp_path: Path, end: str) -> None:
    script = _script(tmp_path, f"#!/bin/sh\nexport X=1\n{end}\n")
    assert find_entrypoint(_runscript(tmp_path, f'"{script}"'), "/bin") == [str(script)]


@pytest.mark.parametrize(
    "end",
    [
        "exec nginx -g 'daemon off;'",
        'exec gunicorn app:app "$@"',
        'exec gosu app java -jar app.jar "$@"',
        'exec tini -- redis-server "$@"',
        'exec env A=b gunicorn "$@"',
        '# exec "$@"\nnginx',
        'retry() {\n  "$@"\n}\nretry true\nretry true\nretry true\nexec nginx',
    ],
)
def test_a_script_that_starts_an_application_of_its_own_is_not_run(tmp_path: Path, end: str) -> None:
    script = _script(tmp_path, f"#!/bin/sh\nexport X=1\n{end}\n")
    assert find_entrypoint(_runscript(tmp_path, f'"{script}"'), "/bin") == []


def test_commands_find_what_it_sets_and_not_what_it_takes_away(tmp_path: Path) -> None:
    script = _script(
        tmp_path,
        '#!/bin/sh\necho a banner; echo another >&2\nexport PATH="/opt/tool/bin:$PATH" LINES_="a\nb"\n'
        'export BYTES="$(printf "\\377")"\nunset GONE\ncd /\nexec "$@"\n',
    )
    base = {"PATH": "/usr/bin:/bin", "GONE": "1", "KEPT": "k", "PWD": "/workspace", "SHLVL": "7"}
    assert _after(script, base) == {
        "PATH": "/opt/tool/bin:/usr/bin:/bin",
        "LINES_": "a\nb",
        "BYTES": "\udcff",
        "KEPT": "k",
        "PWD": "/workspace",
        "SHLVL": "7",
    }
    assert list((tmp_path / "spool").iterdir()) == []


def test_what_is_ours_stays_as_it_is(tmp_path: Path) -> None:
    script = _script(tmp_path, '#!/bin/sh\nexport HPC_WORKSPACE_X=1\nexec env -i A=b "$@"\n')
    base = {"PATH": "/usr/bin:/bin", "HPC_WORKSPACE_SESSION": "the mark"}
    assert _after(script, base) == {"A": "b", "HPC_WORKSPACE_SESSION": "the mark"}


def test_it_finds_an_empty_stdin_and_a_session_of_its_own(tmp_path: Path) -> None:
    script = _script(tmp_path, '#!/bin/sh\nX="$(cat)"; X="$X$$ $(ps -o sid= -p $$)"; export X\nexec "$@"\n')
    pid, session = _after(script, {"PATH": "/usr/bin:/bin"})["X"].split()
    assert pid == session


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "#!/bin/sh\necho first >&2; echo no \x1bdatabase >&2; exit 7\n",
            "exit code 7 and did not hand over: no ?database",
        ),
        ("#!/bin/sh\nexit 0\n", "exit code 0 and did not hand over: it said nothing"),
        ("#!/nowhere/sh\n", "can't be started"),
    ],
)
def test_where_it_fails_the_environment_stays_and_one_line_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    base = {"PATH": "/usr/bin:/bin", "A": "b"}
    assert _after(_script(tmp_path, text), base) == base
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert "entrypoint.sh" in lines[0]


def test_one_that_does_not_end_is_ended_with_all_that_it_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = _script(tmp_path, "#!/bin/bash\nset -m\ntrap '' TERM\nsleep 61 &\necho $$ $! > pids\nwait\n")
    base = {"PATH": "/usr/bin:/bin"}
    began_s = time.monotonic()
    assert _after(script, base, timeout_s=0.5) == base
    assert time.monotonic() - began_s < 5
    assert "did not hand over within 0.5 s" in capsys.readouterr().err
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    eventually(lambda: not any(is_alive(pid) for pid in pids))


def test_what_it_starts_in_the_background_stays(tmp_path: Path) -> None:
    script = _script(tmp_path, '#!/bin/sh\nsleep 61 &\necho $! > pid\nexport DISPLAY=:7\nexec "$@"\n')
    began_s = time.monotonic()
    assert _after(script, {"PATH": "/usr/bin:/bin"})["DISPLAY"] == ":7"
    assert time.monotonic() - began_s < 5
    pid = int((tmp_path / "pid").read_text())
    try:
        assert is_alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
