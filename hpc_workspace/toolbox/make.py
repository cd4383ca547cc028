"""How a toolbox is made: copied from the interpreter that runs now, and tried out before it counts."""

from __future__ import annotations

import compileall
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import py_compile
import re
import shutil
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc_workspace import processes
from hpc_workspace.errors import PrerequisiteError
from hpc_workspace.server import layout
from hpc_workspace.toolbox.manifest import MANIFEST, digest_of, digests_of
from hpc_workspace.version import __version__

log = logging.getLogger(__name__)

_ROOTS = ("starlette", "uvicorn", "websockets", "python-multipart")
_LEFT_OUT = ("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data", "site-packages",
             "dist-packages")  # fmt: skip
_LDD_LINE = re.compile(r"\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)")
_ELF_MAGIC = b"\x7fELF"
_TRIAL_TIMEOUT_S = 120.0

# Starts the server without `site`, the environment or the user's directories: nothing of the image is imported.
_SERVE = """\
import sys
from os.path import abspath, dirname, join

_root = dirname(abspath(__file__))
sys.path.insert(0, join(_root, "site"))
from hpc_workspace.server.launch import main

sys.exit(main(sys.argv[1:], toolbox=_root))
"""

# The git that git itself starts, in submodules: found as its own program, and with its own loader.
_GIT_OF_GIT = """\
#!/bin/sh
root=${0%/*}/..
exec "$root/lib/LOADER" --library-path "$root/lib" "$root/bin/git" "$@"
""".replace("LOADER", layout.LOADER)

# Imports all that the server does, sooner or later, and fails if anything came from elsewhere, or if a shared object
# did that has no copy here (where a binary names a path for it, the copy is used where that path does not exist).
_TRIAL = """\
import importlib, os, pkgutil, sys
root = os.path.realpath(sys.argv[1]) + "/"
sys.path.insert(0, root + "site")
import hpc_workspace.server
names = ["ssl", "uvicorn.lifespan.off", "uvicorn.loops.asyncio", "uvicorn.protocols.http.auto",
         "uvicorn.protocols.websockets.websockets_sansio_impl", "anyio", "concurrent.futures.thread", "encodings.idna",
         "encodings.latin_1"]
names += ["hpc_workspace.server." + module.name for module in pkgutil.iter_modules(hpc_workspace.server.__path__)]
for name in names:
    if not name.endswith("__"):
        importlib.import_module(name)
sys.modules["anyio"].run(sys.modules["anyio"].sleep, 0)  # its backend is imported when it runs
files = {getattr(module, "__file__", None) for module in list(sys.modules.values())} - {None}
strangers = {file for file in files if not os.path.realpath(file).startswith(root)}
if not os.path.exists("/etc/ld.so.preload"):
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
    ours = os.listdir(root + "lib")
    strangers |= {path for path in mapped if not path.startswith(root) and os.path.basename(path) not in ours}
sys.exit("used from outside: " + ", ".join(sorted(strangers)) if strangers else 0)
"""


def _package() -> Path:
    return Path(__file__).parents[1]


def toolbox_key() -> str:
    """What makes one toolbox differ from another: interpreter, platform, packages, git, the server's own code."""
    digest = hashlib.sha256()
    for part in (sys.version, platform.machine(), __version__, _SERVE, *sorted(_versions(_distributions()))):
        digest.update(f"{part}\0".encode())
    git = _find_git()
    digest.update(_git_digest(git).encode() if git is not None else b"")
    for file in _server_files():
        digest.update(file.read_bytes())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"{platform.python_version()}-{digest.hexdigest()[:12]}"


def _server_files() -> list[Path]:
    package = _package()
    return [package / "__init__.py", package / "version.py", *sorted((package / "server").glob("*.py"))]


def _versions(distributions: Iterable[importlib.metadata.Distribution]) -> Iterator[str]:
    for distribution in distributions:
        yield f"{distribution.metadata['Name']}=={distribution.version}"


def _distributions() -> list[importlib.metadata.Distribution]:
    """The server's dependencies and theirs, as far as they are installed (a marker may have left one out)."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(_ROOTS)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in found[name].requires or []:
            if "extra ==" not in requirement and (match := re.match(r"[A-Za-z0-9._-]+", requirement)):
                todo.append(match[0])
    return list(found.values())


def make_toolbox(root: Path) -> None:
    """Make a toolbox at `root` and try it out.

    Raises:
        OSError, PrerequisiteError: it can't be made, or does not run.
    """
    (root / "bin").mkdir(parents=True)
    (root / "lib").mkdir()
    binary = root / "bin" / "python3"
    shutil.copy(os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable), binary)
    _copy_library(root)
    _copy_site(root / "site")
    (root / "serve.py").write_text(_SERVE)
    _compile(root)
    objects = [binary, *(file for file in root.rglob("*.so*") if file.is_file())]
    _copy_shared_objects(objects, root / "lib", root, beside=sysconfig.get_config_var("LIBDIR") or "")
    git = _bring_git(root)
    _try_out(root)
    (root / MANIFEST).write_text(json.dumps(_manifest_of(root, git), separators=(",", ":")))
    _close_to_others(root)


def _manifest_of(root: Path, git: str | None) -> dict[str, Any]:
    sizes = [file.stat().st_size for file in root.rglob("*") if file.is_file()]
    return {
        "key": toolbox_key(),
        "python": platform.python_version(),
        "git": git,
        "files": len(sizes),
        "bytes": sum(sizes),
        "digests": digests_of(root),
    }


def _close_to_others(root: Path) -> None:
    """Take group's and others' permission to write, which a umask or a source may have given."""
    for path in (root, *root.rglob("*")):
        mode = path.lstat().st_mode
        if mode & 0o022 and not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode) & ~0o022)


def _try_out(root: Path) -> None:
    """Run the toolbox as a container would: its own loader and libraries, no environment, all imports of the server.

    Raises:
        PrerequisiteError: it does not run, or takes something from outside of itself.
    """
    argv = [*layout.python_argv("."), "-c", _TRIAL, "."]
    try:
        ended = processes.run(argv, timeout_s=_TRIAL_TIMEOUT_S, env={}, cwd=str(root))
        if ended.returncode == 0:
            return
        said = ended.said or f"It ended with {ended.returncode} and said nothing."
    except (OSError, PrerequisiteError, processes.ProgramTimeoutError) as error:
        said = str(error)
    raise PrerequisiteError(
        f"The toolbox for the bundled server, made of {sys.executable}, does not run.",
        evidence=said,
        remedy=_remedy_for_noexec(root),
    )


def _remedy_for_noexec(root: Path) -> str:
    return (
        f"If {root.parent} is mounted noexec, set cache_dir (or HPC_WORKSPACE_CACHE) to a directory that is not; "
        "else use another Python."
    )


def _copy_library(root: Path) -> None:
    """The standard library, where an interpreter in root/bin looks for it. Times are kept: .pyc hang on them."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    source = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix}))
    shutil.copytree(source, root / "lib" / version, ignore=_leave_out, symlinks=False)
    dynamic = Path(sysconfig.get_config_var("DESTSHARED") or source / "lib-dynload")
    target = root / sys.platlibdir / version / "lib-dynload"
    if not target.exists() and dynamic.is_dir():
        shutil.copytree(dynamic, target)


def _leave_out(folder: str, names: list[str]) -> list[str]:
    # Bytecode for -O and -OO is a third of some libraries, and never used here.
    useless = ("opt-1.pyc", "opt-2.pyc", ".a")
    return [name for name in names if name in _LEFT_OUT or name.startswith("config-") or name.endswith(useless)]


def _copy_site(target: Path) -> None:
    for distribution in _distributions():
        for file in distribution.files or []:
            source = Path(str(distribution.locate_file(file)))
            if ".." in file.parts or not source.is_file():
                continue
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / file)
    for source in _server_files():
        place = target / "hpc_workspace" / source.relative_to(_package())
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place)


def _compile(root: Path) -> None:
    """Bytecode for what came without: the tree is bound read-only, so that otherwise every start would compile anew.

    Unchecked: nobody edits the tree, and a start over a network file system saves a stat for each module.
    """
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for folder in (root / "lib", root / "site"):
        # Some files of the standard library are broken on purpose; what can't be compiled is never imported.
        compileall.compile_dir(folder, quiet=2, maxlevels=20, invalidation_mode=mode, stripdir=str(root), workers=1)


def _copy_shared_objects(objects: Sequence[Path], lib: Path, root: Path, beside: str = "") -> None:
    """Copy to `lib` all that ldd names for the objects and is not in `root`, and the loader under a name of its own.

    Args:
        beside: a directory to look in too, where the objects name theirs relative to a place that they have left.

    Raises:
        PrerequisiteError: they have no loader.
    """
    search_path = ":".join(filter(None, (beside, os.environ.get("LD_LIBRARY_PATH", ""))))
    environment = {**os.environ, "LD_LIBRARY_PATH": search_path} if search_path else None
    ended = processes.run(
        [processes.find_program("ldd", of_system=True) or "ldd", *map(str, objects)], timeout_s=120, env=environment
    )
    needed = {match[1] for line in ended.stdout.splitlines() if (match := _LDD_LINE.match(line))}
    loaders = sorted(path for path in needed if re.match(r"ld-|ld\d*\.so", Path(path).name))
    if not loaders:
        raise PrerequisiteError(
            f"{objects[0].name} is linked statically, or ldd does not say how.",
            evidence="\n".join(dict.fromkeys(line.strip() for line in ended.said.splitlines())),
            remedy=_remedy_for_noexec(root),
        )
    for path in sorted(needed):
        if not Path(path).is_relative_to(root):
            shutil.copy(os.path.realpath(path), lib / Path(path).name)
    shutil.copy(os.path.realpath(loaders[0]), lib / layout.LOADER)


def _find_git() -> Path | None:
    """The binary of the git on PATH, else the system's; it may be a script that calls it. None where there is none."""
    found = processes.find_program("git", of_system=True)
    if found is None:
        return None
    binary = os.path.realpath(found)
    if not _is_elf(binary):
        binary = f"{_git_exec_path(found)}/git"
    return Path(binary) if _is_elf(binary) else None


@functools.cache
def _git_exec_path(git: str) -> str:
    try:
        return processes.run([git, "--exec-path"], timeout_s=10).stdout.strip()
    except (OSError, PrerequisiteError, processes.ProgramTimeoutError):
        return ""


def _is_elf(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_ELF_MAGIC)) == _ELF_MAGIC
    except OSError:
        return False


def _git_digest(binary: Path) -> str:
    found = binary.stat()
    return _digest_once(binary, found.st_size, found.st_mtime_ns)


@functools.cache
def _digest_once(path: Path, size: int, mtime_ns: int) -> str:
    return digest_of(path)


def _bring_git(root: Path) -> str | None:
    """Put git and all that it needs into the toolbox; returns its version. None where there is none that runs so.

    Only what is built into the one binary: no network, no hooks' shell, nothing that git has as a script.
    """
    binary = _find_git()
    if binary is None:
        return None
    place = root / layout.GIT
    try:
        (place / "bin").mkdir(parents=True)
        (place / "lib").mkdir()
        shutil.copy(binary, place / "bin" / "git")
        _copy_shared_objects([binary], place / "lib", root)
        program = root / layout.GIT_PROGRAMS / "git"
        program.parent.mkdir()
        program.write_text(_GIT_OF_GIT)
        program.chmod(0o755)
        argv = [*layout.git_argv("."), "--version"]
        ended = processes.run(argv, timeout_s=_TRIAL_TIMEOUT_S, env={}, cwd=str(root))
        if ended.returncode == 0:
            return ended.stdout.strip().removeprefix("git version ")
        said = ended.said
    except (PrerequisiteError, processes.ProgramTimeoutError) as error:
        said = str(error)
    log.warning("git is left out of the toolbox, images without git will have none: %s: %s", binary, said)
    shutil.rmtree(place)
    return None
