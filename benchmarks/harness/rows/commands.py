"""Commands on this node: one at a time, and many at once."""

from __future__ import annotations

from benchmarks.harness.floors import at_once_per_s, spawned_s, timed_s
from benchmarks.harness.places import Places
from benchmarks.harness.values import Contestant, Goal, Measure, Row
from hpc_workspace import Workspace

UPSTREAM = "upstream's client on its server"
_SLEEP = "sleep 0.05"


def run_command(workspace: Workspace, command: str) -> None:
    """One command, which must end well."""
    result = workspace.execute_command(command)
    if result.exit_code != 0:
        raise OSError(f"{command!r} ended with {result.exit_code}: {result.stderr}")


def _bundled_ms(command: str) -> Measure:
    return lambda places: timed_s(lambda: run_command(places.bundled, command)) * 1000


def _openhands_ms(command: str) -> Measure:
    return lambda places: timed_s(lambda: run_command(places.openhands, command)) * 1000


def _upstream_ms(command: str, warm_ups: int = 0) -> Measure:
    return lambda places: float(places.upstream.ask("command", command=command, warm_ups=warm_ups)["took_s"]) * 1000


def _spawn_ms(command: str) -> Measure:
    return lambda places: spawned_s(command.split()) * 1000


def _upstream_per_s(count: int, at_once: int) -> Measure:
    def measure(places: Places) -> float:
        return count / float(places.upstream.ask("commands", command="true", count=count, at_once=at_once)["took_s"])

    return measure


def _at_once(at_once: int, count: int) -> Row:
    return Row(
        name=f"commands-per-second-{at_once}",
        what=f"`true`, {at_once} at once, {count} in a round",
        unit="1/s",
        node="n01",
        contestants=(
            Contestant(
                "bundled server",
                "ours",
                lambda places: at_once_per_s(lambda: run_command(places.bundled, "true"), count=count, at_once=at_once),
            ),
            Contestant(
                "bare spawn",
                "floor",
                lambda _: at_once_per_s(lambda: spawned_s(["true"]), count=count, at_once=at_once),
            ),
            Contestant(UPSTREAM, "peer", _upstream_per_s(count, at_once)),
            Contestant(
                "our client on OpenHands' server",
                "peer",
                lambda places: at_once_per_s(
                    lambda: run_command(places.openhands, "true"), count=count, at_once=at_once
                ),
            ),
        ),
        goals=(Goal("ratio", 1.0, UPSTREAM),),
        rounds=10,
    )


ROWS: tuple[Row, ...] = (
    Row(
        name="command-true",
        what="`true`, bundled server",
        unit="ms",
        node="n01",
        contestants=(
            Contestant("bundled server", "ours", _bundled_ms("true")),
            Contestant("bare spawn", "floor", _spawn_ms("true")),
            Contestant("raw POST past the door", "floor", lambda places: places.raw_bundled_true.post_s() * 1000),
            Contestant(UPSTREAM, "peer", _upstream_ms("true", warm_ups=1)),
        ),
        goals=(Goal("figure", 4.0), Goal("ratio", 1 / 3, UPSTREAM)),
        rounds=100,
        warm_ups=1,
    ),
    Row(
        name="command-true-openhands",
        what="`true`, OpenHands' server",
        unit="ms",
        node="n01",
        contestants=(
            Contestant("OpenHands' server", "ours", _openhands_ms("true")),
            Contestant("raw POST", "floor", lambda places: places.raw_openhands_true.post_s() * 1000),
            Contestant(UPSTREAM, "peer", _upstream_ms("true", warm_ups=1)),
        ),
        goals=(Goal("ratio", 1.1, "raw POST"),),
        rounds=100,
        warm_ups=1,
    ),
    Row(
        name="command-sleep",
        what=f"`{_SLEEP}`, bundled server",
        unit="ms",
        node="n01",
        contestants=(
            Contestant("bundled server", "ours", _bundled_ms(_SLEEP)),
            Contestant("bare spawn", "floor", _spawn_ms(_SLEEP)),
            Contestant(UPSTREAM, "peer", _upstream_ms(_SLEEP)),
            Contestant("our client on OpenHands' server", "peer", _openhands_ms(_SLEEP)),
        ),
        goals=(Goal("figure", 56.0),),
        rounds=50,
    ),
    _at_once(1, 16),
    _at_once(8, 64),
    _at_once(32, 96),
)
