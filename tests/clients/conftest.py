"""One server for all client tests. Nothing in here or beside imports the project's packages."""

from collections.abc import Iterator

import pytest

from tests.clients.running_server import RunningServer, serving


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def url(server: RunningServer) -> str:
    return server.url
