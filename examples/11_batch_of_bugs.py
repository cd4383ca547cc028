"""A benchmark of real bugs: twelve small repositories, each with a failing test, over several images.

    python examples/11_batch_of_bugs.py RUN_DIR IMAGE... [--agent golden|wrong|nobody] [--slurm PARTITION]

The images need python3 and git. The agent asks no model: it applies the patch that lies beside each repository, the
right one or a wrong one. Put your own in its place: it gets an open workspace and the task, and returns what JSON can
hold. For SWE-bench's instances: docs/batch.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hpc_workspace import SlurmOptions, Workspace
from hpc_workspace.batch import evaluate

BUGS = Path(__file__).with_name("bugs")
REPOSITORY = "/workspace/repository"
COMMIT = "git init -q && git add -A && git -c user.name=x -c user.email=x@localhost commit -q -m 'As it was found'"


def repair(workspace: Workspace, task: dict[str, Any]) -> dict[str, Any]:
    """Bring the repository in, have the agent work on it, and run its tests."""
    workspace.file_upload(Path(task["directory"], "repository"), REPOSITORY)
    require(workspace, COMMIT)
    if task["agent"] != "nobody":
        workspace.write_file("/workspace/patch", Path(task["directory"], f"{task['agent']}.patch").read_bytes())
        require(workspace, "git apply /workspace/patch")
    tests = workspace.execute_command("python3 -B -m unittest -q", cwd=REPOSITORY, timeout=60)
    print(tests.stderr)  # into the attempt's agent.log
    return {"resolved": tests.exit_code == 0}


def require(workspace: Workspace, command: str) -> None:
    done = workspace.execute_command(command, cwd=REPOSITORY)
    if done.exit_code != 0:
        raise RuntimeError(f"{command}: {done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--agent", choices=("golden", "wrong", "nobody"), default="golden")
    parser.add_argument("--slurm", metavar="PARTITION")
    options = parser.parse_args()
    tasks = [
        {
            "id": folder.name,
            "directory": str(folder),
            "agent": options.agent,
            "image": options.images[number % len(options.images)],
        }
        for number, folder in enumerate(sorted(BUGS.iterdir()))
    ]
    report = evaluate(
        repair,
        tasks,
        run_dir=options.run_dir,
        image=lambda task: task["image"],
        slurm=SlurmOptions(partition=options.slurm, time="20", cpus_per_task=2, mem="2G") if options.slurm else None,
        pilots=2,
        workspaces_per_pilot=2,
        task_timeout="5min",
        patch=REPOSITORY,
    )
    resolved = sum(line["status"] == "done" and line["result"]["resolved"] for line in report.results)
    print(f"{resolved} of {len(tasks)} resolved; {report.infra_losses} lost to the infrastructure")
    print(f"see {options.run_dir}/report.html")


if __name__ == "__main__":
    main()
