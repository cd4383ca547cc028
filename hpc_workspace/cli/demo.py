"""`hpc-workspace demo`: a small repository with a failing test, mended in a real workspace."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_workspace import clock
from hpc_workspace.processes import find_program

if TYPE_CHECKING:
    from hpc_workspace.results import CommandResult
    from hpc_workspace.workspace import Workspace

IMAGE_VARIABLE = "HPC_WORKSPACE_DEMO_IMAGE"

_BROKEN = '''\
def mean(values):
    """The arithmetic mean of a list of numbers."""
    return sum(values) / (len(values) + 1)
'''
_FIX = ("(len(values) + 1)", "len(values)")
_TEST = """\
import unittest

from stats import mean


class MeanTest(unittest.TestCase):
    def test_mean_of_three_numbers(self):
        self.assertEqual(mean([1, 2, 6]), 3)


if __name__ == "__main__":
    unittest.main()
"""


def choose_demo_options(options: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """`options`, with an image or the plain process put in where the user named neither."""
    if options["runtime"] == "process" or any(options[name] for name in ("sif_file", "image", "server_image")):
        return options
    image = os.environ.get(IMAGE_VARIABLE)
    if image and (find_program("apptainer") or find_program("singularity")):
        return {**options, "image": image}
    reason = "no image was named (--sif, --image)" if not image else "Apptainer is not available here"
    say(f"NOTE: {reason}: this runs the bundled server as a plain process. That is NOT a sandbox.")
    return {**options, "runtime": "process"}


class DemoFailed(Exception):
    """A step did not do what it says."""


def run_demo(workspace: Workspace) -> int:
    """Run all steps. Returns 0 only if every one did what it says."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    times: list[tuple[str, float]] = []

    def step(title: str, action: Callable[[], str]) -> None:
        began_s = clock.now_s()
        said = action()
        times.append((title, clock.now_s() - began_s))
        console.print(f"[green]✓[/green] {title}: {said}", highlight=False)

    try:
        step("start a workspace", lambda: _start(workspace))
        try:
            for title, action in _steps(workspace):
                step(title, action)
        finally:
            step("clean up", lambda: _close(workspace))
    except DemoFailed as failure:
        console.print(f"[red]✗[/red] {failure}", highlight=False)
        return 1
    table = Table("step", "seconds", title="Where the time went")
    for title, seconds in times:
        table.add_row(title, f"{seconds:.3f}")
    console.print(table)
    return 0


def _start(workspace: Workspace) -> str:
    workspace.start()
    sandbox = (
        "NOT a sandbox: a plain process" if workspace.runtime == "process" else f"a container of {workspace.runtime}"
    )
    return f"{workspace.id} on {workspace.node}, {sandbox}"


def _close(workspace: Workspace) -> str:
    workspace.close()
    return "nothing is left"


def _steps(workspace: Workspace) -> list[tuple[str, Callable[[], str]]]:
    return [
        ("upload a repository", lambda: _upload(workspace)),
        ("its test fails", lambda: _run_tests(workspace, should_pass=False)),
        ("apply a fix", lambda: _fix(workspace)),
        ("its test passes", lambda: _run_tests(workspace, should_pass=True)),
        ("look at the diff", lambda: _diff(workspace)),
        ("download the file", lambda: _download(workspace)),
    ]


def _upload(workspace: Workspace) -> str:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, text in (("stats.py", _BROKEN), ("test_stats.py", _TEST)):
            entry = tarfile.TarInfo(f"demo/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(archive.getvalue())
        file.flush()
        size = workspace.file_upload(file.name, "demo.tar").file_size
    _expect(workspace.execute_command("tar xf demo.tar && rm demo.tar"), 0)
    if _has_git(workspace):
        _expect(
            workspace.execute_command(
                "git init -q && git add . && git -c user.name=demo -c user.email=demo@localhost commit -qm broken",
                cwd="demo",
            ),
            0,
        )
    else:
        _expect(workspace.execute_command("cp -r demo demo.orig"), 0)
    return f"2 files, {size} bytes"


def _has_git(workspace: Workspace) -> bool:
    return workspace.execute_command("command -v git").exit_code == 0


def _run_tests(workspace: Workspace, *, should_pass: bool) -> str:
    result = workspace.execute_command("python3 -m unittest -q test_stats", cwd="demo")
    passed = result.exit_code == 0 and "OK" in result.stderr
    failed = result.exit_code == 1 and "FAILED" in result.stderr
    if not (passed if should_pass else failed):
        raise DemoFailed(
            f"the test should {'pass' if should_pass else 'fail'}, and said: {result.stderr or result.stdout}"
        )
    return result.stderr.strip().splitlines()[-1]


def _fix(workspace: Workspace) -> str:
    source = workspace.read_file("demo/stats.py").decode()
    workspace.write_file("demo/stats.py", source.replace(*_FIX))
    return f"{_FIX[0]} → {_FIX[1]}"


def _diff(workspace: Workspace) -> str:
    if _has_git(workspace):
        result = workspace.execute_command("git diff --no-color", cwd="demo")
        _expect(result, 0)
    else:
        result = workspace.execute_command("diff -ru -x __pycache__ demo.orig demo")
        _expect(result, 1)
    if f"+    return sum(values) / {_FIX[1]}" not in result.stdout:
        raise DemoFailed(f"the diff does not show the fix: {result.stdout}")
    return "1 file changed\n" + "\n".join(line for line in result.stdout.splitlines() if line[:1] in "+-")


def _download(workspace: Workspace) -> str:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stats.py"
        size = workspace.file_download("demo/stats.py", target).file_size
        if target.read_text() != _BROKEN.replace(*_FIX):
            raise DemoFailed("the downloaded file is not the one that was fixed")
    return f"{size} bytes, as expected"


def _expect(result: CommandResult, exit_code: int) -> None:
    if result.exit_code != exit_code:
        raise DemoFailed(f"`{result.command}` exited {result.exit_code}: {result.stderr or result.stdout}")
