"""Writes the environment that it was started with to a file. Run by its path, as the last program of an entrypoint.

Format: as in /proc/self/environ, entries ended by NUL; an empty entry at the end says that it is whole.
"""

import os
import sys


def main(path: str) -> int:
    """Write the environment to the file `path`, which must exist.

    Raises:
        OSError: it does not, or belongs to another user than this one.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_initial_environment() + b"\0")
    return 0


def _initial_environment() -> bytes:
    """The environment before Python changed it (PEP 538 sets LC_CTYPE in a C locale)."""
    try:
        with open("/proc/self/environ", "rb") as file:
            return file.read()
    except OSError:
        return b"".join(name + b"=" + value + b"\0" for name, value in os.environb.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
