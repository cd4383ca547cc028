"""What is taken from the host: its apt mirror, proxy, certificates, pip index, and the programs it must have.

Nothing of it is written down in the repository, and nothing of it stays in an image.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from .base import HOST_ENV, ClusterError, run, say

# program -> the Debian package that brings it
HOST_PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ssh-keygen": "openssh-client",
}
MIRROR_VARIABLE = "HPC_WORKSPACE_CLUSTER_MIRROR"
SECURITY_MIRROR_VARIABLE = "HPC_WORKSPACE_CLUSTER_SECURITY_MIRROR"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def require_programs() -> None:
    """Install the host's missing programs with apt-get, once and together.

    Raises:
        ClusterError: not root, or apt-get failed; the message says what to install.
    """
    if os.geteuid() != 0:
        raise ClusterError("needs root (namespaces, mounts, cgroups)")
    path = HOST_ENV["PATH"]
    packages = {package for program, package in HOST_PROGRAMS.items() if shutil.which(program, path=path) is None}
    if not KEYRING.exists():
        packages.add("debian-archive-keyring")
    if not packages:
        return
    wanted = sorted(packages)
    say(f"installing on this host: {' '.join(wanted)}")
    try:
        run(["apt-get", "update", "-q"])
        run(["apt-get", "install", "-q", "-y", "--no-install-recommends", *wanted])
    except ClusterError as error:
        raise ClusterError(f"install these on this host first: {' '.join(wanted)} ({error})") from error


def apt_mirrors() -> tuple[str, str | None]:
    """The Debian mirror and the security mirror (or None) that the host's apt uses, or that the environment names.

    Source: apt-get(8) `indextargets`; LABEL is the Release file's, "Debian" and "Debian-Security".
    """
    if named := os.environ.get(MIRROR_VARIABLE):
        return named, os.environ.get(SECURITY_MIRROR_VARIABLE)
    found: dict[str, str] = {}
    for _ in range(2):
        lines = run(["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)"]).stdout.splitlines()
        for label, _, uri in (line.partition("|") for line in lines):
            found.setdefault(label, uri)
        if "Debian" in found:
            return found["Debian"], found.get("Debian-Security")
        run(["apt-get", "update", "-q"], check=False)  # no lists yet, as in a fresh container
    raise ClusterError(f"this host's apt knows no Debian mirror; name one in {MIRROR_VARIABLE}")


def apt_options() -> list[str]:
    """The host's apt settings that the way to the mirror needs (proxy, certificates, credentials), as apt.conf lines.

    Source: apt.conf(5), `apt-config dump` prints `Name "value";`, list members as `Name:: "value";`.
    """
    wanted = re.compile(r'^Acquire::(http|https|ftp|Retries|ForceIPv[46]|Proxy)\b.*"[^"]+";$', re.IGNORECASE)
    lines = [line for line in run(["apt-config", "dump"]).stdout.splitlines() if wanted.match(line)]
    if Path("/etc/apt/auth.conf").exists():
        lines.append('Dir::Etc::netrc "/etc/apt/auth.conf";')
    return lines


def proxy_env() -> dict[str, str]:
    """The caller's proxy variables, for programs that must reach the network."""
    names = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
    return {key: value for key, value in os.environ.items() if key.lower() in names}


def ca_bundle() -> Path | None:
    """The file of certificates that the host trusts, or None."""
    variables = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
    candidates = [os.environ[name] for name in variables if os.environ.get(name)]
    candidates += ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"]
    return next((Path(name) for name in candidates if Path(name).is_file()), None)


def pip_settings() -> dict[str, str]:
    """The host's pip configuration as `PIP_*` variables, without what only means something on the host.

    Left out: `file:` indexes and local directories (not there in a chroot), the certificate (given by path, see
    `ca_bundle`). Source: `pip config list`, lines such as `global.index-url='https://…'` and `:env:.cert='…'`.
    """
    settings: dict[str, str] = {}
    done = run(["python3", "-m", "pip", "config", "list"], env=dict(os.environ), check=False)
    for line in (done.stdout or "").splitlines():
        name, _, quoted = line.partition("=")
        key = name.rsplit(".", 1)[-1].replace("_", "-")
        value = quoted.strip().strip("'\"")
        if key in ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "retries"):
            words = [word for word in value.split() if not word.startswith(("file:", "/"))]
            if words:
                settings["PIP_" + key.upper().replace("-", "_")] = " ".join(words)
    return settings
