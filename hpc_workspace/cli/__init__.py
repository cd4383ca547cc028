"""The command line. `main` turns every error of ours into its message on stderr: no traceback unless `--debug`."""

from __future__ import annotations

import sys


def main() -> None:
    """The `hpc-workspace` command."""
    from hpc_workspace.cli.commands import cli
    from hpc_workspace.errors import WorkspaceError

    try:
        cli(standalone_mode=True)
    except WorkspaceError as error:
        if "--debug" in sys.argv:
            raise
        sys.stderr.write(f"hpc-workspace: {error}\n")
        sys.exit(EXIT_INFRASTRUCTURE)


# What a command can't be told apart from its own exit code otherwise: ssh(1) uses 255 in the same way.
EXIT_INFRASTRUCTURE = 255
EXIT_TIMEOUT = 124  # as timeout(1)
