"""A registry and a store for each test, and an environment in which no login and no proxy of the user's is found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.registry import Registry
from tests.unit.images.pulling import Puller, make_certificate

_OF_THE_USER = (
    "APPTAINER",
    "SINGULARITY",
    "DOCKER",
    "REGISTRY_AUTH_FILE",
    "HPC_WORKSPACE",
    "XDG_",
    "SLURM",
    "SSL_CERT",
)


@pytest.fixture(scope="session")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates that are trusted: one that nobody shows. All of a machine's take longer to read than a fetch."""
    return make_certificate(tmp_path_factory.mktemp("authorities") / "one.pem")


@pytest.fixture(autouse=True)
def _nobodys_environment(tmp_path: Path, authorities: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(_OF_THE_USER) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    home = tmp_path / "user"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SSL_CERT_FILE", str(authorities))
    monkeypatch.setenv("HPC_WORKSPACE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HPC_WORKSPACE_CACHE", str(tmp_path / "store"))


@pytest.fixture
def r() -> Iterator[Registry]:
    with Registry() as registry:
        yield registry


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The store's directory, which is not there yet."""
    return tmp_path / "store"


@pytest.fixture
def pull(root: Path, r: Registry) -> Puller:
    return Puller(root, r)


@pytest.fixture
def pullers(root: Path, r: Registry) -> Callable[[int], list[Puller]]:
    """So many clients of one store, each with a fetcher of its own."""
    return lambda count: [Puller(root, r) for _ in range(count)]
