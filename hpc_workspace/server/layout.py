"""Where things are in the toolbox, and how its programs are started: what its maker and the server in it both know.

Source: ld.so(8), --library-path: the directories to search instead of LD_LIBRARY_PATH.
"""

LOADER = "ld.so"
GIT = "git"
# What git finds where it looks for its own programs; nothing of the image's, and nothing of the machine it is from.
GIT_PROGRAMS = "git/exec"


def server_argv(root: str) -> list[str]:
    """The bundled server, from the toolbox that is seen at `root`, up to its own arguments."""
    return [*python_argv(root), f"{root}/serve.py"]


def python_argv(root: str) -> list[str]:
    """The toolbox's interpreter, without `site`, the environment's settings, the user's directories or new bytecode."""
    return [*_loaded(root, "python3"), "-I", "-S", "-B"]


def git_argv(root: str) -> list[str]:
    """The toolbox's git, whose shared objects are its own: the interpreter may bring others of the same names."""
    return _loaded(f"{root}/{GIT}", "git")


def _loaded(folder: str, program: str) -> list[str]:
    return [f"{folder}/lib/{LOADER}", "--library-path", f"{folder}/lib", f"{folder}/bin/{program}"]
