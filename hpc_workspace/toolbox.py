"""The toolbox: this interpreter and the bundled server as one directory that runs in any image, bound read-only.

It holds the interpreter's binary, its standard library, the shared objects that these name and the dynamic loader that
goes with them, so that it needs nothing of the image, not even a C library. Made once for each version, beside its
final name and then renamed: who loses a race throws his own away.
"""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import py_compile
import re
import secrets
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from hpc_workspace import processes
from hpc_workspace.errors import PrerequisiteError
from hpc_workspace.version import __version__

MANIFEST = "toolbox.json"
_ROOTS = ("starlette", "uvicorn", "websockets", "python-multipart")
_LEFT_OUT = ("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data", "site-packages",
             "dist-packages")  # fmt: skip
_LDD_LINE = re.compile(r"\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)")
_LOADER = "ld.so"

# Starts the server without `site`, the environment or the user's directories: nothing of the image is imported.
_SERVE = """\
import sys
from os.path import dirname, join

sys.path.insert(0, join(dirname(__file__), "site"))
from hpc_workspace.server.launch import main

sys.exit(main(sys.argv[1:]))
"""


def toolbox_argv(mount: str) -> list[str]:
    """The argv, up to the server's own arguments, that runs the bundled server from the toolbox bound at `mount`."""
    return [
        f"{mount}/lib/{_LOADER}",
        "--library-path",
        f"{mount}/lib",
        f"{mount}/bin/python3",
        "-I",
        "-S",
        "-B",
        f"{mount}/serve.py",
    ]


def ensure_toolbox(root: Path) -> Path:
    """The toolbox of this version below `root`, made if it is not there (about 5 s).

    Raises:
        PrerequisiteError: it can't be made here: no ldd, no room.
    """
    target = root / f"toolbox-{_key()}"
    if (target / MANIFEST).is_file():
        return target
    aside = root / f".{target.name}.{secrets.token_hex(6)}.part"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(aside)
        # A loser of the race finds the target there and not empty: the winner's is as good.
        with contextlib.suppress(OSError):
            aside.rename(target)
    except OSError as error:
        raise PrerequisiteError(
            f"The toolbox for the bundled server can't be made in {root}.",
            evidence=str(error),
            remedy="Set cache_dir (or HPC_WORKSPACE_CACHE) to a directory with 150 MB of room.",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if not (target / MANIFEST).is_file():
        raise PrerequisiteError(f"{target} is incomplete.", remedy="Remove it and start again.")
    return target


def _package() -> Path:
    return Path(__file__).parent


def _key() -> str:
    """What makes one toolbox differ from another: interpreter, platform, packages, the server's own code."""
    digest = hashlib.sha256()
    for part in (sys.version, platform.machine(), __version__, _SERVE, *sorted(_versions(_distributions()))):
        digest.update(f"{part}\0".encode())
    for file in _server_files():
        digest.update(file.read_bytes())
    digest.update(Path(__file__).read_bytes())
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


def _make(root: Path) -> None:
    (root / "bin").mkdir(parents=True)
    (root / "lib").mkdir()
    binary = root / "bin" / "python3"
    shutil.copy(os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable), binary)
    _copy_library(root)
    _copy_site(root / "site")
    (root / "serve.py").write_text(_SERVE)
    _compile(root)
    _copy_shared_objects(root, binary)
    sizes = [file.stat().st_size for file in root.rglob("*") if file.is_file()]
    manifest = {"key": _key(), "python": platform.python_version(), "files": len(sizes), "bytes": sum(sizes)}
    (root / MANIFEST).write_text(json.dumps(manifest))


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


def _copy_shared_objects(root: Path, binary: Path) -> None:
    """All that ldd names for the binary and every extension module, and the loader under a name of its own."""
    objects = [binary, *(file for file in root.rglob("*.so*") if file.is_file())]
    ended = processes.run(["ldd", *map(str, objects)], timeout_s=120)
    needed = {match[1] for line in ended.stdout.splitlines() if (match := _LDD_LINE.match(line))}
    loaders = sorted(path for path in needed if re.match(r"ld-|ld\d*\.so", Path(path).name))
    if not loaders:
        raise PrerequisiteError(
            f"The interpreter {sys.executable} is linked statically, or ldd does not say how.", evidence=ended.said
        )
    for path in sorted(needed):
        if not path.startswith(str(root)):
            shutil.copy(os.path.realpath(path), root / "lib" / Path(path).name)
    shutil.copy(os.path.realpath(loaders[0]), root / "lib" / _LOADER)
