"""One server for all tests of a module; tests that stop or starve it start their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.server.running import RunningServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()
