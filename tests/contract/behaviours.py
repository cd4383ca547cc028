"""What every workspace does, whatever it runs in: one function a claim, each taking an open workspace.

Imports nothing but the package, so that it also runs on the nodes of the test cluster:

    python behaviours.py '{"image": "/shared/images/tiny.sif"}'

prints one line of JSON a claim: its name, and what went wrong, or null.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path

from hpc_workspace import ApptainerWorkspace, SlurmOptions, Workspace
from hpc_workspace.results import CommandResult, OutputChunk


def it_keeps_stdout_stderr_and_exit_code_apart(w: Workspace) -> None:
    result = w.execute_command("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
    assert result.timeout_occurred is False
    assert result.command == "echo out; echo err >&2; exit 3"


def it_starts_commands_in_the_working_dir(w: Workspace) -> None:
    assert w.execute_command("pwd").stdout.strip() == w.working_dir


def it_makes_the_working_dir_writable(w: Workspace) -> None:
    assert w.execute_command("touch it && rm it").exit_code == 0


def it_gives_commands_an_empty_stdin(w: Workspace) -> None:
    assert w.execute_command("cat; echo done", timeout=10).stdout == "done\n"


def it_adds_env_to_the_command_and_quotes_it(w: Workspace) -> None:
    value = "a b'c\"d$e"
    assert w.execute_command('printf %s "$X"', env={"X": value}).stdout == value


def it_says_when_the_time_ran_out_and_keeps_what_was_printed(w: Workspace) -> None:
    result = w.execute_command("echo before; sleep 30", timeout=1)
    assert result.timeout_occurred
    assert result.exit_code == -1
    assert result.stdout == "before\n"


def it_streams_output_and_ends_with_the_result(w: Workspace) -> None:
    items = list(w.stream_command("echo one; echo two >&2; exit 4"))
    chunks = [item for item in items if isinstance(item, OutputChunk)]
    assert b"".join(c.data for c in chunks if c.stream == "stdout") == b"one\n"
    assert b"".join(c.data for c in chunks if c.stream == "stderr") == b"two\n"
    last = items[-1]
    assert isinstance(last, CommandResult)
    assert last.exit_code == 4


def it_carries_files_both_ways_with_mode_and_any_name(w: Workspace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a b;ü.sh")
        source.write_bytes(bytes(range(256)) * 5000)
        source.chmod(0o755)
        assert w.file_upload(source, "d/a b;ü.sh").file_size == 1280000
        assert w.execute_command("test -x 'd/a b;ü.sh'").exit_code == 0
        w.file_download("d/a b;ü.sh", Path(folder, "back"))
        assert Path(folder, "back").read_bytes() == source.read_bytes()


def it_reads_and_writes_files_whole(w: Workspace) -> None:
    w.write_file("x.txt", "grüß\n")
    assert w.read_file("x.txt") == "grüß\n".encode()


def it_is_alive_and_says_what_serves_it(w: Workspace) -> None:
    assert w.alive
    assert "title" in w.health()


def it_can_be_attached_to_by_its_id_alone(w: Workspace) -> None:
    other = Workspace.attach(w.id)
    assert other.execute_command("echo here").stdout == "here\n"
    other.disconnect()
    assert w.alive


def it_serves_other_clients_at_host_with_the_key_only(w: Workspace) -> None:
    import urllib.error
    import urllib.request

    open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    assert open_url(f"{w.host}/health", timeout=10).status == 200
    try:
        open_url(f"{w.host}/api/git/changes?path=/", timeout=10)
    except urllib.error.HTTPError as error:
        assert error.code == 401
    else:
        raise AssertionError("served without a key")


def its_key_is_in_no_command_s_environment_or_argv(w: Workspace) -> None:
    seen = w.execute_command("env; cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
    assert w.api_key not in seen


def it_shows_its_state_and_no_key_in_its_repr(w: Workspace) -> None:
    assert w.id in repr(w)
    assert w.api_key not in repr(w)


def it_counts_half_seconds(w: Workspace) -> None:
    result = w.execute_command("sleep 0.9; echo slept", timeout=0.5)
    assert result.timeout_occurred
    assert result.stdout == ""


def it_streams_output_before_the_command_ends(w: Workspace) -> None:
    command = "rm -f go; echo first; until [ -e go ]; do sleep 0.02; done; echo last"
    seen = []
    for item in w.stream_command(command, timeout=5):
        if isinstance(item, OutputChunk):
            seen.append(item.data)
            w.write_file("go", b"")
        else:
            assert not item.timeout_occurred, "nothing came before the end"
    assert b"".join(seen) == b"first\nlast\n"


def it_keeps_every_byte_of_the_output(w: Workspace) -> None:
    result = w.execute_command(r"printf '\377\000x'")
    assert result.stdout.encode("utf-8", "surrogateescape") == b"\xff\x00x"


def it_does_not_wait_for_a_background_child_that_holds_stdout(w: Workspace) -> None:
    result = w.execute_command("sleep 8 & echo done", timeout=3)
    assert not result.timeout_occurred
    assert result.stdout == "done\n"


def it_gives_a_signal_as_a_negative_exit_code(w: Workspace) -> None:
    assert w.execute_command("kill -9 $$").exit_code == -9


def it_ends_what_a_timed_out_command_started(w: Workspace) -> None:
    w.execute_command("sleep 987 & sleep 987", timeout=1)
    left = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; done 2>/dev/null | grep -c 'sleep 98[7]'"
    assert w.execute_command(left).stdout.strip() == "0"


BEHAVIOURS = {
    name: value for name, value in dict(globals()).items() if name.startswith(("it_", "its_")) and callable(value)
}


def main(options: dict[str, object]) -> None:
    if isinstance(options.get("slurm"), dict):
        options["slurm"] = SlurmOptions(**options["slurm"])  # type: ignore[arg-type]
    with ApptainerWorkspace(**options) as w:
        for name, behaviour in BEHAVIOURS.items():
            try:
                behaviour(w)
                wrong = None
            except Exception:  # noqa: BLE001 - told to the test that reads the line
                wrong = traceback.format_exc()
            print(json.dumps({"name": name, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
