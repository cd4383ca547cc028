"""Debian trees: the one that all nodes share, and those that images are made of.

A tree is named by a hash of what makes it, built as `….part` and renamed when whole, so that a name is a promise.
"""

from __future__ import annotations

from pathlib import Path

from .base import ClusterError, State, digest, remove_tree, run, say
from .host import KEYRING, apt_mirrors, apt_options, ca_bundle, pip_settings, proxy_env

SUITE = "trixie"
RECIPE = "1"  # raise it when the code below changes what a tree holds

IN_TREE_SCRIPT = Path(__file__).with_name("in_tree.sh")

USERS = {"tester": 2001, "stranger": 2002}

# slurmdbd and MariaDB only run with `up --accounting`.
# fmt: off
NODE_PACKAGES = [
    "slurm-wlm", "slurm-client", "libpam-slurm-adopt", "munge", "slurmdbd", "mariadb-server", "openssh-server",
    "openssh-client", "apptainer", "squashfs-tools", "squashfuse", "fuse-overlayfs", "gocryptfs", "fuse2fs",
    "fuse3", "e2fsprogs", "uidmap", "python3", "python3-venv", "python3-pip", "docker-registry", "skopeo",
    "umoci", "busybox-static", "ca-certificates", "curl", "git", "rsync", "iproute2", "iputils-ping", "procps",
    "psmisc", "lsof", "tini", "jq", "tmux", "strace", "less", "xz-utils", "netcat-openbsd",
]
# fmt: on

# Apptainer is in sid only; nothing else may come from there. Source: apt_preferences(5).
PIN = "Package: *\nPin: release n=sid\nPin-Priority: 50\n\nPackage: apptainer\nPin: release n=sid\nPin-Priority: 990\n"


def build_debian(
    target: Path,
    packages: list[str],
    *,
    variant: str,
    with_sid: bool,
    log: Path,
    suite: str = SUITE,
    sources: tuple[str, ...] = (),
    accept_stale_sid: bool = False,
) -> None:
    """Make a Debian tree at `target` (which must not exist) with mmdebstrap, from the mirror that the host uses.

    A mirror may lag: sid's Release file is valid for seven days only (seen: a mirror whose sid was 24 days old, the
    rest fresh). Then, and with a notice, sid alone is used without the check of its age; signatures are always checked.
    A suite other than ours comes without its security updates, which a mirror may lack.

    Nothing of the host's mirror, proxy or certificates stays in it. The source packages named in `sources` are put, as
    they were fetched, into its /usr/src.

    Source: mmdebstrap(1) 1.3.5; `--dpkgopt=path-exclude` as in its examples, `MMDEBSTRAP_APT_CONFIG` in a hook likewise.
    """
    mirror, security = apt_mirrors()
    lines = [f"deb {mirror} {suite} main"]
    if security and suite == SUITE:
        lines.append(f"deb {security} {suite}-security main")
    hooks: list[str] = []
    if sources:
        lines.append(f"deb-src {mirror} {suite} main")
        fetch = f"apt-get source --download-only {' '.join(sources)}"
        hooks.append(f'--customize-hook=cd "$1/usr/src" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG {fetch}')
    if with_sid:
        lines.append(f"deb {'[check-valid-until=no] ' if accept_stale_sid else ''}{mirror} sid main")
        pin = target.parent / "apt-pin"
        pin.write_text(PIN)
        hooks += [f"--setup-hook=copy-in {pin} /etc/apt/preferences.d/"]
    log.unlink(missing_ok=True)
    argv: list[str | Path] = ["mmdebstrap", "--mode=root", f"--variant={variant}", "--format=directory"]
    argv += [f"--keyring={KEYRING}", f"--include={','.join(packages)}"]
    argv += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale", "info")]
    argv += [f"--aptopt={line.rstrip(';')}" for line in apt_options()]
    argv += [*hooks, suite, target, *lines]
    env = {**proxy_env(), "TMPDIR": str(target.parent)}
    done = run(argv, env=env, log=log, check=accept_stale_sid or not with_sid)
    if done.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-20:]
        if not any("/sid/InRelease is expired" in line for line in tail):
            raise ClusterError("mmdebstrap failed:\n" + "\n".join(tail))
        say("the mirror's sid is past its date: Apptainer is taken from it without that check (signatures are checked)")
        remove_tree(target)
        build_debian(
            target,
            packages,
            variant=variant,
            with_sid=True,
            log=log,
            suite=suite,
            sources=sources,
            accept_stale_sid=True,
        )
        return
    for pattern in (
        "etc/apt/sources.list",
        "etc/apt/sources.list.d/*",
        "etc/apt/apt.conf.d/99mmdebstrap",
        "var/lib/apt/lists/*Release",
        "var/lib/apt/lists/*Packages",
        "var/lib/apt/lists/*Sources",
        "var/lib/apt/lists/*lz4",
        "var/log/*.log",
        "var/log/apt/*",
        "var/cache/apt/*.bin",
    ):
        for path in target.glob(pattern):
            if path.is_file() or path.is_symlink():
                path.unlink()


def node_tree(state: State) -> Path:
    """Where the nodes' tree is, or will be."""
    return state.cache / f"rootfs-{digest(RECIPE, SUITE, PIN, *NODE_PACKAGES)}"


def require_node_tree(state: State) -> Path:
    """The nodes' tree, made if it is missing (2 to 4 minutes)."""
    tree = node_tree(state)
    if tree.is_dir():
        return tree
    state.cache.mkdir(parents=True, exist_ok=True)
    part = tree.with_suffix(".part")
    remove_tree(part)
    say("building the nodes' root file system (some minutes; log: cache/rootfs.log)")
    build_debian(part, NODE_PACKAGES, variant="minbase", with_sid=True, log=state.cache / "rootfs.log")
    for user, uid in USERS.items():
        run(["chroot", part, "useradd", "-M", "-u", str(uid), "-U", "-s", "/bin/bash", "-d", f"/home/{user}", user])
        # "*" and not "!": no password fits, but the account is not locked for sshd.
        run(["chroot", part, "usermod", "-p", "*", user])
    for key in part.glob("etc/ssh/ssh_host_*"):
        key.unlink()
    for name in ("hostname", "hosts", "resolv.conf", "machine-id"):
        path = part / "etc" / name
        path.unlink(missing_ok=True)
        path.touch()
    (part / "shared").mkdir(exist_ok=True)
    part.rename(tree)
    return tree


def run_in_tree(
    tree: Path, argv: list[str], *, log: Path, env: dict[str, str] | None = None, binds: dict[Path, str] | None = None
) -> None:
    """Run a program chrooted in `tree`, with the host's network, name service and certificates.

    The mounts are made in a mount namespace of their own: they end with the program and nothing of them stays in the
    tree but empty mount points that were there before.

    Args:
        tree: a Debian tree.
        argv: the program, as seen in the tree.
        log: a file that gets all output.
        env: variables on top of a clean environment.
        binds: host directory -> absolute path in the tree, made if missing.
    """
    pairs: list[str] = []
    for source, inside in (binds or {}).items():
        (tree / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)
        pairs += [str(source), inside]
    for name in ("resolv.conf", "hosts"):
        (tree / "etc" / name).touch()
    certificates = str(ca_bundle() or "/dev/null")
    argv_out = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", str(IN_TREE_SCRIPT), str(tree)]
    run(
        [*argv_out, certificates, *pairs, "--", *argv],
        env={**proxy_env(), **(env or {})},
        log=log,
    )


def pip_env() -> dict[str, str]:
    """Variables with which pip in a tree (see `run_in_tree`) reaches the index that the host uses."""
    env = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    env |= pip_settings()
    if ca_bundle() is not None:
        env["PIP_CERT"] = "/tmp/ca.pem"
    return env
