"""One server for all tests that do not change how it runs; after each it must be quiet."""

from collections.abc import Iterator

import pytest

from tests.serving import Running, running


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    yield shared_server
    assert shared_server.is_quiet(), "something of a request is left"
