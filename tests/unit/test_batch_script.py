"""The batch script and sbatch's argv: golden files, and names and values that would like to be something else.

`Submission` is both; its text is compared with tests/unit/golden/NAME.sbatch. To accept what has changed, run

    UPDATE_GOLDEN=1 .venv/bin/python -m pytest tests/unit/test_batch_script.py

which writes the files anew, and read their diff before it is committed.

The nasty names are run: the batch script by bash, with a program of that name in the interpreter's place, and sbatch's
argv through an sbatch on PATH that writes down what it was called with.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from hpc_workspace import ApptainerWorkspace, SlurmOptions
from hpc_workspace.errors import ConfigError, WorkspaceError
from hpc_workspace.launch import slurm
from hpc_workspace.launch.slurm_commands import EXPORTED
from hpc_workspace.rendezvous import WorkspaceDirectory
from tests.conftest import skip_or_fail

GOLDEN = Path(__file__).parent / "golden"
HOW_TO_UPDATE = "If this is as it should be: UPDATE_GOLDEN=1 .venv/bin/python -m pytest tests/unit/test_batch_script.py"
PYTHON = "/shared/venv/bin/python"
HOME = "/shared/home/alice/.hpc_workspace"

EVERYTHING: dict[str, Any] = {
    "partition": "gpu", "account": "proj", "qos": "long", "reservation": "course", "time": "1-12:00:00",
    "cpus_per_task": 8, "mem": "32G", "tmp": "100G", "gres": "gpu:a100:2", "gpus": "a100:2", "gpus_per_node": "2",
    "cpus_per_gpu": 4, "licenses": "matlab:1", "constraint": "intel&ib", "nodelist": "n[01-04]", "exclude": "n03",
    "exclusive": "user", "begin": "now+1hour", "dependency": "afterok:4211", "nice": 100, "mail_type": "END,FAIL",
    "mail_user": "alice@example.org", "comment": "one of many", "extra": {"wckey": "w", "spread_job": None, "--hint": "compute_bound"},
    "setup": ["module load apptainer"], "template": None, "python": PYTHON,
}  # fmt: skip
# Each its directory and its options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (HOME, {"python": PYTHON}),
    "everything": (HOME, EVERYTHING),
    "setup": (
        HOME,
        {
            "python": PYTHON,
            "partition": "cpu",
            "setup": ["module purge", "module load apptainer/1.4", "", "export TMPDIR=/scratch/$USER", "ulimit -c 0"],
        },
    ),
    "flags": (
        HOME,
        {"python": "python3", "exclusive": True, "nice": 0, "requeue": True, "extra": {"spread-job": None}},
    ),
    "nasty": (
        """/shared/a"=0"; touch x/it's $HOME and `id` %j/# * ~ {{ x }} ü""",
        {
            "python": """/opt/my "python" -c/$(id)'s/#!/bin/python3""",
            "partition": "a b",
            "account": "'; scancel --me; '",
            "comment": '$HOME "%j" `id` \\',
            "extra": {"wckey": "--wrap=id", "admin-comment": ""},
        },
    ),
    "own_template": (
        HOME,
        {"python": PYTHON, "setup": ["module load apptainer"], "template": str(GOLDEN / "own.sbatch.j2")},
    ),
}


def make_submission(home: str, options: dict[str, Any]) -> slurm.Submission:
    directory = WorkspaceDirectory(Path(home) / "workspaces" / "ws-0123456789")
    return slurm.make_submission(directory, SlurmOptions(**options))


@pytest.mark.parametrize("name", CASES)
def test_argv_and_batch_script_are_as_the_golden_file_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in EXPORTED:
        monkeypatch.setenv(variable, os.environ.get(variable, "x"))
    text = str(make_submission(*CASES[name]))
    file = GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    golden = file.read_text() if file.exists() else ""
    if text != golden:
        lines = difflib.unified_diff(golden.splitlines(), text.splitlines(), file.name, "now", n=1, lineterm="")
        pytest.fail("\n".join([*lines, HOW_TO_UPDATE]), pytrace=False)


def test_every_golden_file_belongs_to_a_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.sbatch")} == set(CASES)


def test_everything_is_every_option_that_can_go_with_the_others() -> None:
    rivals_of_mem = {"mem_per_cpu", "mem_per_gpu"}
    assert set(SlurmOptions.model_fields) - set(EVERYTHING) <= rivals_of_mem | {"requeue"}


@pytest.mark.parametrize("name", CASES)
def test_shellcheck_and_bash_find_nothing_in_a_golden_script(name: str, tmp_path: Path) -> None:
    _, script = (GOLDEN / f"{name}.sbatch").read_text().split("\n", 1)
    file = tmp_path / "job.sbatch"
    file.write_text(script)
    parsed = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True, check=False)
    assert (parsed.stderr, parsed.returncode) == ("", 0)
    if shutil.which("shellcheck") is None:
        skip_or_fail("there is no shellcheck (Debian: apt-get install shellcheck)")
    # SC2016 warns that nothing expands between single quotes, which is what they are there for.
    argv = ["shellcheck", "--norc", "--severity=style", "--exclude=SC2016", str(file)]
    found = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0)


def test_without_python_the_interpreter_is_the_one_that_runs_now() -> None:
    last = make_submission(HOME, {}).script.splitlines()[-1]
    assert sys.executable in shlex.split(last)


# Names that a shell, Slurm, jinja or a decoder might take for something else, none with a slash or a control character.
_BYTES = [
    b'a"=0"', b"a'; echo foo", b"a b", b" leading", b"trailing ", b"$HOME", b"${HOME}", b"$(touch executed)", b"`touch executed`",
    b"; touch executed;", b"&& touch executed", b"| touch executed", b"&", b"(touch executed)", b"> executed", b"< nosuch",
    b"%j", b"%%", b"100%", b"%10u", b"a\\b", b"ends\\", b"\\n", b"\\\\", b"-rf", b"-c", b"--", b"#", b"#SBATCH --array=1-2",
    b"*", b"?", b"[a-z]", b"~", b"~root", b"!!", b"{a,b}", b"{{ python }}", b"{% raw %}", b"a=b", b"'", b"''", b'"', b"$'\\x41'",
    b"'$(touch executed)'", b"a:b,c", "ü→名前".encode(), b"e\xcc\x81", b"\xff\xfe", b"caf\xe9", b"\xed\xb3\xbf",
    "\x85\x9b\u2028\ufeff".encode(),  # what Python takes for the end of a line, and no shell does
]  # fmt: skip
# As Python has them: what is not UTF-8 is in surrogates (PEP 383).
NASTY = [os.fsdecode(name) for name in _BYTES]


def _put_recorder(path: Path) -> None:
    """At `path` a program that writes its argv to the file $SEEN, each argument ended by a NUL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\nprintf "%s\\0" "$0" "$@" >"$SEEN"\n')
    path.chmod(0o755)


def _run_script(script: Path, tmp_path: Path, path: str = os.defpath) -> list[bytes]:
    """What the batch script calls: its argv. It does so once, says nothing and leaves nothing where it was started."""
    here = tmp_path / "here"
    here.mkdir()
    environment = {"PATH": path, "HOME": "/nonexistent", "SEEN": str(tmp_path / "seen")}
    ended = subprocess.run(["bash", script], cwd=here, env=environment, capture_output=True, timeout=30, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == (b"", b"", 0)
    assert list(here.iterdir()) == []
    return (tmp_path / "seen").read_bytes().split(b"\0")[:-1]


def _write_script(directory: WorkspaceDirectory, python: str) -> Path:
    """The batch script as it is written, whether or not sbatch would get as far as submitting it."""
    template, options = slurm.find_template(None), SlurmOptions(python=python)
    script = slurm.render_batch_script(template, options=options, directory=str(directory.path))
    directory.write_batch_script(script)
    return directory.batch_script


def _called(python: Path, directory: WorkspaceDirectory) -> list[bytes]:
    return [os.fsencode(python), b"-m", b"hpc_workspace.node", os.fsencode(directory.path)]


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_directory_and_interpreter_reach_the_node_program_byte_for_byte(name: str, tmp_path: Path) -> None:
    python = tmp_path / name / "bin" / name
    _put_recorder(python)
    _put_recorder(tmp_path / "other" / "bin" / "other")  # for what a pattern might match
    directory = WorkspaceDirectory(tmp_path / name / "workspaces" / name)
    directory.path.mkdir(parents=True)
    assert _run_script(_write_script(directory, str(python)), tmp_path) == _called(python, directory)


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_an_interpreter_is_found_on_path_by_any_name(name: str, tmp_path: Path) -> None:
    python = tmp_path / "bin" / name
    _put_recorder(python)
    directory = WorkspaceDirectory(tmp_path)
    path = f"{python.parent}:{os.defpath}"
    assert _run_script(_write_script(directory, name), tmp_path, path) == _called(python, directory)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch on PATH that takes the job as number 4211; the file has its argv, if it was called."""
    return _put_sbatch(tmp_path, monkeypatch, "echo 4211")


@pytest.fixture
def refusing_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `sbatch`, but it takes no job."""
    return _put_sbatch(tmp_path, monkeypatch, "echo no >&2; exit 1")


def _put_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> Path:
    seen = tmp_path / "sbatch.argv"
    program = tmp_path / "slurm" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >{shlex.quote(str(seen))}\n{answer}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return seen


def _takes(name: str, value: object) -> bool:
    """Whether the option `name` may have this value."""
    try:
        SlurmOptions(**{name: value})
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("value", NASTY, ids=ascii)
def test_sbatch_gets_every_option_byte_for_byte(value: str, sbatch: Path, tmp_path: Path) -> None:
    ours = {"extra", "setup", "template", "python"}
    given = {option: value for option in SlurmOptions.model_fields if option not in ours and _takes(option, value)}
    assert {"partition", "comment", "nodelist", "exclusive"} <= set(given)
    folder = value.replace("\\", "x")  # a directory with a backslash has a test of its own
    directory = WorkspaceDirectory(tmp_path / folder / "ws-0123456789")
    directory.path.mkdir(parents=True)
    launched = slurm.submit(directory, SlurmOptions(**given, extra={"wckey": value}))
    assert launched.job_id == "4211"
    *argv, script = sbatch.read_bytes().split(b"\0")[:-1]
    for option in [*given, "wckey"]:
        assert os.fsencode(f"--{option.replace('_', '-')}={value}") in argv
    assert os.fsencode(f"--chdir={directory.path}") in argv
    assert all(argument.startswith(b"--") for argument in argv)
    assert script == os.fsencode(directory.batch_script)
    assert stat.S_IMODE(directory.batch_script.stat().st_mode) == 0o600


def _as_slurm_reads(pattern: bytes, cwd: bytes) -> bytes:
    """The file that Slurm writes to for the `--output` of a batch job whose percent signs are all doubled.

    Source: src/slurmd/slurmstepd/fname.c, fname_create and is_path_escaped: a name with a backslash anywhere loses all
    of them and is taken as it is; what is relative follows the job's directory, of which nothing is replaced.
    """
    before = b"" if pattern.startswith(b"/") else cwd + b"/"
    if b"\\" in pattern:
        return before + pattern.replace(b"\\", b"")
    assert not re.search(rb"(?<!%)(%%)*%(?!%)", pattern)
    return before + pattern.replace(b"%%", b"%")


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_slurm_writes_the_log_where_it_is_looked_for_or_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    directory = WorkspaceDirectory(tmp_path / name / "ws-0123456789")
    try:
        argv = slurm.make_submission(directory, SlurmOptions()).argv
    except WorkspaceError as error:
        assert "\\" in name
        assert "backslash" in str(error)
    else:
        values = dict(argument.split("=", 1) for argument in argv if "=" in argument)
        found = _as_slurm_reads(os.fsencode(values["--output"]), os.fsencode(values["--chdir"]))
        assert found == os.fsencode(directory.node_log)


CONTROL = [chr(code) for code in (*range(0x20), 0x7F)]
_SAMPLES = ("abc", "30", "4G", "gpu:1", "1")


def _is_text(annotation: object) -> bool:
    """Whether a value of this type may be, or have in it, a string."""
    return annotation is str or any(_is_text(part) for part in get_args(annotation))


def _shapes(name: str, text: str) -> Iterator[object]:
    """The option's values that hold `text`: itself, or a list or table of it."""
    annotation = SlurmOptions.model_fields[name].annotation
    origin = get_origin(annotation)
    if origin is list:
        yield [text]
        yield ["true", text]
    elif origin is dict:
        yield {"wckey": text}
        yield {text: "a"}
        yield {text: None}
    else:
        yield text


TEXTS = [name for name, field in SlurmOptions.model_fields.items() if _is_text(field.annotation)]


@pytest.mark.parametrize("name", TEXTS)
def test_a_control_character_in_an_option_is_a_config_error_that_names_it(name: str) -> None:
    sample = next(text for text in _SAMPLES if all(_takes(name, shape) for shape in _shapes(name, text)))
    is_plain = next(_shapes(name, sample)) == sample
    for char in CONTROL:
        for text in (char, char + sample, sample + char, f"{sample}{char}{sample}"):
            for value in _shapes(name, text):
                with pytest.raises(ConfigError) as caught:
                    SlurmOptions(**{name: value})
                error = caught.value
                assert error.option == name or (not is_plain and error.option.startswith(f"{name}."))
                assert name in error.what
                assert not set(CONTROL) & set(error.what + error.option)


@pytest.mark.parametrize("name", [name for name in SlurmOptions.model_fields if name not in TEXTS])
def test_an_option_that_is_no_text_brings_no_control_character_into_argv(name: str) -> None:
    for char in CONTROL:
        for text in (char, f"{char}1", f"1{char}", f"1{char}1", f"true{char}"):
            if _takes(name, text):
                argv = make_submission(HOME, {name: text}).argv
                assert not set(CONTROL) & set("".join(argv))


def test_what_can_not_be_written_as_bytes_is_a_config_error() -> None:
    for name in TEXTS:
        for value in _shapes(name, "\ud800"):
            with pytest.raises(ConfigError, match=name):
                SlurmOptions(**{name: value})


@pytest.mark.parametrize("line", ["#SBATCH --array=1-9", "#SBATCH -p gpu"])
def test_a_line_of_setup_that_sbatch_would_read_as_options_is_a_config_error(line: str) -> None:
    """sbatch(1): its options are read from the script up to the first line that is neither empty nor a comment."""
    with pytest.raises(ConfigError, match="SBATCH") as caught:
        SlurmOptions(setup=[line, "module load apptainer"])
    assert caught.value.option.startswith("setup")


BROKEN = {
    "not UTF-8": b"#!/bin/bash\n# caf\xe9\n",
    "an unknown name": b"{{ nosuch }}",
    "an unknown filter": b"{{ python | nosuch }}",
    "no end": b"{% for line in setup %}",
    "a division by zero": b"{{ 1 / 0 }}",
    "a sum of text and number": b"{{ python + 1 }}",
    "another file": b"{% include 'other' %}",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_template_is_a_config_error_that_names_it(what: str, tmp_path: Path) -> None:
    template = tmp_path / "own.j2"
    template.write_bytes(BROKEN[what])
    with pytest.raises(ConfigError, match=re.escape(str(template))) as caught:
        make_submission(HOME, {"template": str(template)})
    assert caught.value.option == "template"


@pytest.mark.parametrize(
    "path", ["/nonexistent/own.j2", ".", "~nobody-of-this-name/own.j2", "a/" * 3000, "x" * 300, ""]
)
def test_a_template_that_is_no_file_is_a_config_error(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_submission(HOME, {"template": path})
    assert caught.value.option == "template"


def test_a_template_with_the_line_ends_of_another_system_gives_a_script_that_slurm_takes(tmp_path: Path) -> None:
    """sbatch refuses a script with carriage returns."""
    template = tmp_path / "own.j2"
    template.write_bytes(b"#!/bin/bash\r\nexec {{ python | quote }} -m x {{ directory | quote }}\r\n")
    script = make_submission(HOME, {"python": PYTHON, "template": str(template)}).script
    assert script == f"#!/bin/bash\nexec {PYTHON} -m x {HOME}/workspaces/ws-0123456789\n"


def _by_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_HOME", str(folder))


def _by_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPC_WORKSPACE_HOME")
    monkeypatch.setenv("HOME", str(folder))


def _by_current_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HPC_WORKSPACE_HOME", "state")


def _require_refused(sbatch: Path) -> None:
    """Neither a dry run nor a start gets as far as sbatch, and both say which variable to set."""
    workspace = ApptainerWorkspace(runtime="process", slurm=SlurmOptions())
    for act in (workspace.dry_run, workspace.start):
        with pytest.raises(WorkspaceError, match="HPC_WORKSPACE_HOME") as caught:
            act()
        assert "control character" in str(caught.value)
        assert not set(CONTROL) & set(caught.value.what)
        assert not sbatch.exists()


def test_a_state_directory_with_a_control_character_is_refused_before_anything_is_submitted(
    refusing_sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for char in CONTROL[1:]:  # a NUL can't be in a variable
        _by_variable(tmp_path / f"a{char}b", monkeypatch)
        _require_refused(refusing_sbatch)


@pytest.mark.parametrize("how", [_by_variable, _by_home, _by_current_directory])
def test_a_state_directory_with_a_newline_is_refused_wherever_that_is_from(
    how: Callable[[Path, pytest.MonkeyPatch], None],
    refusing_sbatch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how(tmp_path / "a\ntouch executed\n", monkeypatch)
    _require_refused(refusing_sbatch)


@pytest.mark.parametrize("home", ["~nobody-of-this-name/x", "/dev/null", f"/tmp/{'x' * 300}"])
def test_a_state_directory_that_can_not_be_is_refused_before_anything_is_submitted(
    home: str, refusing_sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_HOME", home)
    with pytest.raises(WorkspaceError, match="HPC_WORKSPACE_HOME"):
        ApptainerWorkspace(runtime="process", slurm=SlurmOptions()).start()
    assert not refusing_sbatch.exists()
