"""The images that the tests use, made here: Debian trees as OCI images, in the cluster's registry, and as SIF files.

Each is named in the cache by a hash of its recipe, and put at /shared/images/NAME.sif on the cluster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .base import ClusterError, State, digest, remove_tree, run, say
from .enter import Node, node_run, require_node
from .files import REGISTRY_PORT
from .rootfs import SUITE, build_debian, pip_env, require_node_tree, run_in_tree

RECIPE = "1"  # raise it when the code below changes what an image holds

MUSL_SCRIPT = Path(__file__).with_name("musl_busybox.sh")


@dataclass(frozen=True)
class Image:
    """One image: its Debian packages, what is done to its tree afterwards, and its OCI configuration.

    Attributes:
        packages: Debian packages beside the essential ones; where there are none, the tree is a static busybox.
        entrypoint: OCI's ENTRYPOINT.
        cmd: OCI's CMD.
        environment: `NAME=value` each; the usual PATH is added where there is none.
        pip: requirements, for `finish`.
        suite: the Debian suite.
        sources: Debian source packages to be fetched into /usr/src.
        files: path in the tree -> text of an executable file.
        finish: called with the state, the tree and the log, when the tree has all of the above.
    """

    packages: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    suite: str = SUITE
    sources: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[State, Path, Path], None] | None = None

    def recipe(self) -> tuple[str, ...]:
        """What the image is made of, `finish` apart, as words to be hashed.

        The labelled words are left out where they say nothing new: images made before these fields came keep their names.
        """
        words = [*self.packages, *self.entrypoint, *self.environment, *self.pip]
        files = [word for pair in self.files.items() for word in pair]
        suite = [self.suite] if self.suite != SUITE else []
        for label, more in (("cmd", self.cmd), ("suite", suite), ("sources", self.sources), ("files", files)):
            words += [label, *more] if more else []
        return tuple(words)


def _install_agent_server(state: State, tree: Path, log: Path) -> None:
    """The real agent server in the place where upstream's image has it. Nothing of the host's pip settings stays."""
    run_in_tree(tree, ["python3", "-m", "venv", "/agent-server/.venv"], log=log)
    argv = ["/agent-server/.venv/bin/pip", "install", "--no-cache-dir", *IMAGES["agent-server"].pip]
    run_in_tree(tree, argv, log=log, env=pip_env())


def _keep_musl(state: State, tree: Path, log: Path) -> None:
    """Of a tree with compiler and source there stays musl's dynamic loader and a busybox that needs it: no glibc."""
    run_in_tree(tree, ["sh", "/usr/src/build.sh"], log=log)
    builder = tree.with_suffix(".builder")
    remove_tree(builder)
    tree.rename(builder)
    (loader,) = builder.glob("usr/lib/ld-musl-*.so.1")
    _busybox_tree(tree, builder / "usr/src/busybox/busybox", loader=loader)
    remove_tree(builder)


# What entrypoints of Docker images do: set up an environment that is nowhere else, and become the command.
ENTRYPOINT_SCRIPT = """#!/bin/sh
set -e
export FROM_ENTRYPOINT='set by the entrypoint'
export PATH="/opt/tool/bin:$PATH"
exec "$@"
"""

PATH_VARIABLE = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

IMAGES = {
    "tiny": Image(packages=("python3", "tini", "bash"), entrypoint=("tini", "--")),
    "agent-server": Image(
        packages=("python3", "python3-venv", "tini", "bash", "curl", "git", "jq", "tmux", "procps", "ca-certificates"),
        entrypoint=("tini", "--", "/agent-server/.venv/bin/python", "-m", "openhands.agent_server"),
        pip=("openhands-agent-server==1.58.*", "openhands-tools==1.58.*"),
        finish=_install_agent_server,
    ),
    "busybox": Image(entrypoint=("/bin/sh",)),
    # No Python, no git.
    "debian-plain": Image(packages=("bash",), cmd=("bash",)),
    # glibc 2.31, Python 3.9.
    "debian-old": Image(packages=("bash", "python3", "python2.7", "git"), cmd=("bash",), suite="bullseye"),
    "musl": Image(
        packages=("musl-tools", "gcc", "libc6-dev", "make", "dpkg-dev"),
        cmd=("/bin/sh",),
        sources=("busybox",),
        files={"/usr/src/build.sh": MUSL_SCRIPT.read_text()},
        finish=_keep_musl,
    ),
    "entrypoint": Image(
        entrypoint=("/entrypoint.sh",),
        cmd=("sh",),
        environment=("FROM_IMAGE=a value, with a comma", PATH_VARIABLE.replace("=", "=/opt/image/bin:")),
        files={"/entrypoint.sh": ENTRYPOINT_SCRIPT, "/opt/tool/bin/tool": "#!/bin/sh\necho tool\n"},
    ),
}


def make_images(state: State, names: list[str]) -> None:
    """Make the named images that are missing (all, where none is named).

    Raises:
        ClusterError: an unknown name, or a step failed.
    """
    for name in names or list(IMAGES):
        if name not in IMAGES:
            raise ClusterError(f"there is no image {name!r}; there are {', '.join(IMAGES)}")
        _make_image(state, name, IMAGES[name])


def _make_image(state: State, name: str, image: Image) -> None:
    cached = state.cache / "images" / f"{name}-{digest(name, RECIPE, *image.recipe())}.sif"
    cached.parent.mkdir(parents=True, exist_ok=True)
    layout = cached.with_suffix(".oci")
    if not cached.exists() or not layout.exists():
        say(f"making the image {name} (log: cache/images/{name}.log)")
        _build(state, name, image, cached)
    _push(state, name, layout)
    published = state.shared / "images" / f"{name}.sif"
    published.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # The name says the recipe, the time says the build: shutil.copy2 keeps it.
    if not published.exists() or published.stat().st_mtime_ns != cached.stat().st_mtime_ns:
        aside = published.with_suffix(".part")
        shutil.copy2(cached, aside)
        aside.chmod(0o644)
        aside.rename(published)


def _build(state: State, name: str, image: Image, target: Path) -> None:
    log = target.parent / f"{name}.log"
    tree = target.parent / f"{name}.tree"
    work = state.shared / f".{name}.build"
    remove_tree(tree)
    remove_tree(work)
    if image.packages:
        build_debian(
            tree,
            list(image.packages),
            variant="essential",
            with_sid=False,
            log=log,
            suite=image.suite,
            sources=image.sources,
        )
    else:
        _busybox_tree(tree, require_node_tree(state) / "usr/bin/busybox")
    for inside, text in image.files.items():
        path = tree / inside.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    if image.finish is not None:
        image.finish(state, tree, log)
    work.mkdir(mode=0o700, parents=True)
    shutil.move(tree, work / "tree")
    _to_sif(require_node(state, "login"), name, image, log)
    remove_tree(target.with_suffix(".oci"))
    shutil.move(work / "oci", target.with_suffix(".oci"))
    os.replace(work / "image.sif", target)
    remove_tree(work)


def _push(state: State, name: str, layout: Path) -> None:
    """Push to the cluster's registry what it does not have yet. Source: skopeo-copy(1)."""
    marker = state.registry / f"{name}.pushed"
    if marker.exists() and marker.read_text() == layout.name:
        return
    login = require_node(state, "login")
    # /srv/images is the cache's directory of images, see node.power_on.
    source, target = f"oci:/srv/images/{layout.name}:latest", f"docker://login:{REGISTRY_PORT}/{name}:latest"
    node_run(login, ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", source, target])
    marker.write_text(layout.name)


def _busybox_tree(tree: Path, busybox: Path, *, loader: Path | None = None) -> None:
    """Nothing but that busybox and, where it is not static, the dynamic loader: no other C library, no Python."""
    (tree / "bin").mkdir(parents=True)
    for folder in ("etc", "tmp", "proc", "sys", "dev", "root", "var/tmp"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    if loader is not None:
        (tree / "lib").mkdir()
        shutil.copy(loader, tree / "lib" / loader.name)
    for applet in run(["chroot", tree, "/bin/busybox", "--list"]).stdout.split():
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\n")


def _to_sif(login: Node, name: str, image: Image, log: Path) -> None:
    """Tree -> OCI image -> SIF, with the nodes' own tools. Source: umoci(1), apptainer-build(1)."""
    work = f"/shared/.{name}.build"
    oci = f"{work}/oci:latest"
    settings = [f"--config.entrypoint={word}" for word in image.entrypoint]
    settings += [f"--config.cmd={word}" for word in image.cmd]
    own_path = any(pair.startswith("PATH=") for pair in image.environment)
    environment = image.environment if own_path else (PATH_VARIABLE, *image.environment)
    settings += [f"--config.env={pair}" for pair in environment]
    for argv in (
        ["umoci", "init", "--layout", f"{work}/oci"],
        ["umoci", "new", "--image", oci],
        ["umoci", "insert", "--image", oci, f"{work}/tree", "/"],
        ["umoci", "config", "--image", oci, *settings],
        ["apptainer", "build", "--force", f"{work}/image.sif", f"oci:{work}/oci"],
    ):
        scratch = [f"APPTAINER_TMPDIR={work}", f"APPTAINER_CACHEDIR={work}/cache", f"TMPDIR={work}"]
        node_run(login, ["env", *scratch, *argv], log=log)
