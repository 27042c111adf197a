"""A server in this process and two clients of it, one of them behind a proxy."""

from collections.abc import Iterator

import pytest

from zeolith.client.storage import ClientStorage

from ..support.gates import Gate
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.proxy import Proxy, proxied


@pytest.fixture
def server(tmp_path) -> Iterator[InProcessServer]:
    with serving(tmp_path / "Data.fs") as server:
        yield server


@pytest.fixture
def writer(server: InProcessServer) -> Iterator[ClientStorage]:
    with client_of(server) as storage:
        yield storage


@pytest.fixture
def proxy(server: InProcessServer) -> Iterator[Proxy]:
    with proxied(server.address) as proxy:
        yield proxy


@pytest.fixture
def reader(server: InProcessServer, proxy: Proxy) -> Iterator[ClientStorage]:
    """A client behind the proxy."""
    with client_of(server, addr=proxy.address) as storage:
        yield storage


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()
