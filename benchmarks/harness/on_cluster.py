"""`make bench`: the harness on the test cluster, as an ordinary user; writes `bench.json`, `bench.md` and profiles.

Brings the cluster up and installs the built wheel, as the integration tests do, and leaves it as it was. Without the
wheel (`--from-tree`) the nodes use a copy of the package as it is in the work tree, and what is installed stays.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness.report import (
    SCHEMA_VERSION,
    Machine,
    Report,
    RowReport,
    merge_machines,
    read_node_report,
    to_markdown,
)
from benchmarks.harness.rows import choose
from benchmarks.harness.values import Node
from tests.integration.cluster import VENV, Cluster, why_no_cluster

REPO = Path(__file__).parents[2]
_NODES: tuple[Node, ...] = ("n01", "login")
_DOCS = REPO / "docs/benchmarks.md"
_BEGIN, _END = "<!-- the table of make bench -->", "<!-- its end -->"


def copy_code(shared: Path, *, with_package: bool) -> Path:
    """A copy of the harness, and if asked of the package, on the shared file system, readable by all."""
    folder = shared / "scratch" / f"bench-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o755)
    names = ["benchmarks", *(["hpc_workspace", "slurm_templates"] if with_package else [])]
    for name in names:
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def measure_on(
    cluster: Cluster, node: Node, code: Path, user: str, patterns: list[str], rounds: int | None
) -> tuple[list[RowReport], Machine | None]:
    """The rows of one node, and what it is; None if it did not live to tell."""
    arguments = [*([f"--rounds={rounds}"] if rounds else []), *patterns]
    python_path = f"/shared/scratch/{code.name}"
    command = ["env", f"PYTHONPATH={python_path}", f"{VENV}/python", "-m", "benchmarks.harness", node, *arguments]
    ended = subprocess.run(cluster.argv(node, command, user), stdout=subprocess.PIPE, text=True, check=False)
    lines = ended.stdout.split("\n")[:-1]
    return read_node_report(lines, choose(patterns, node), f"the run on {node} ended with {ended.returncode} before")


def write(report: Report, directory: Path) -> None:
    """The document, the table, and a file for each profile."""
    profiles = directory / "bench-profiles"
    shutil.rmtree(profiles, ignore_errors=True)
    profiles.mkdir(parents=True)
    (directory / "bench.json").write_text(report.model_dump_json(indent=1) + "\n")
    (directory / "bench.md").write_text(to_markdown(report, profiles="build/bench-profiles"))
    for row in report.rows:
        if row.profile:
            (profiles / f"{row.name}.txt").write_text(row.profile)


def put_into_docs(table: str) -> None:
    """Replace the table that `docs/benchmarks.md` has between its two marks."""
    before, begin, rest = _DOCS.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{_DOCS} lacks {_BEGIN} or {_END}")
    _DOCS.write_text(f"{before}{begin}\n\n{table}\n{end}{after}")


def main() -> int:
    """The command line of `make bench`. Lost goals are in the table; they are no failure of the run."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", help="shell patterns of the names of rows, by spaces or commas; none: all")
    parser.add_argument("--rounds", type=int, help="instead of each row's own number of rounds")
    parser.add_argument("--user", default="tester", help="who runs it in the nodes")
    parser.add_argument("--from-tree", action="store_true", help="a copy of the work tree instead of the built wheel")
    parser.add_argument("--into", type=Path, default=REPO / "build", help="where the results are written")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/benchmarks.md too")
    given = parser.parse_args()
    patterns = [pattern for text in given.rows for pattern in text.replace(",", " ").split()]
    if reason := why_no_cluster():
        sys.stderr.write(f"make bench needs the test cluster: {reason}\n")
        return 1
    nodes = [node for node in _NODES if choose(patterns, node)]
    if not nodes:
        sys.stderr.write(f"no row matches {' '.join(patterns)}; there are: {' '.join(r.name for r in choose())}\n")
        return 1
    cluster = Cluster(REPO)
    if not given.from_tree:
        cluster.bring_up()
    shared = Path(json.loads(cluster.call("status", "--json").stdout)["shared"])
    code = copy_code(shared, with_package=given.from_tree)
    # As an installed wheel is; an ordinary user can't write what is compiled next to these sources.
    cluster.run("n01", [f"{VENV}/python", "-m", "compileall", "-q", f"/shared/scratch/{code.name}"], user="root")
    began_s, began_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    try:
        told = [measure_on(cluster, node, code, given.user, patterns, given.rounds) for node in nodes]
    finally:
        shutil.rmtree(code)
        if not given.from_tree:
            cluster.leave()
    machines = [machine for _, machine in told if machine is not None]
    if not machines:
        sys.stderr.write("no node has told anything; what it said is above\n")
        return 1
    report = Report(
        schema_version=SCHEMA_VERSION,
        began_at=began_at,
        took_s=round(time.monotonic() - began_s, 1),
        machine=merge_machines(machines),
        rows=[row for rows, _ in told for row in rows],
    )
    write(report, given.into)
    if given.docs:
        put_into_docs((given.into / "bench.md").read_text())
    sys.stdout.write((given.into / "bench.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
