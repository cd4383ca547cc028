"""A small request by SSH to a node, beside the same request on that node, and by the tunnel an expert would make."""

from __future__ import annotations

from benchmarks.harness.floors import timed_s
from benchmarks.harness.values import Contestant, Goal, Row

_DIRECT = "direct, on the node"
_TUNED = "`ssh -L`, TCP_NODELAY"


def _request_by(route: str) -> Row:
    return Row(
        name=f"request-{route}",
        what=f"a small request from the login node to a job, by {route}",
        unit="ms",
        node="login",
        contestants=(
            Contestant(route, "ours", lambda places: timed_s(places.by_route(route).health) * 1000),
            Contestant(
                _DIRECT, "floor", lambda places: float(places.on_node.ask("health", warm_ups=1)["took_s"]) * 1000
            ),
            Contestant(_TUNED, "peer", lambda places: timed_s(places.tuned_ssh.client.health) * 1000),
        ),
        goals=(Goal("difference", 0.6, _DIRECT), Goal("ratio", 1.0, _TUNED)),
        rounds=300,
        warm_ups=1,
    )


ROWS: tuple[Row, ...] = (_request_by("paramiko"), _request_by("openssh"))
