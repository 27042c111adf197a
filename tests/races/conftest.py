"""A server in this process and two clients of it, one of them behind a proxy."""

from collections.abc import Iterator
from typing import Any

import pytest

from zeolith.client import cache_writer
from zeolith.client.storage import ClientStorage

from ..support.gates import Gate
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.proxy import Proxy, proxied


@pytest.fixture
def server(tmp_path) -> Iterator[InProcessServer]:
    with serving(tmp_path / "Data.fs") as server:
        yield server


@pytest.fixture
def cached() -> dict[str, Any]:
    """Options of `reader`: where it caches. See `in_memory_and_on_disk`."""
    return {}


@pytest.fixture(params=["memory", "disk"])
def in_memory_and_on_disk(request, tmp_path, monkeypatch) -> dict[str, Any]:
    """Both, one after the other."""
    if request.param == "memory":
        return {}
    # What is to be written is written at once: reads come from the file.
    for wait in ("FLUSH_WAIT_S", "LATER_WAIT_S"):
        monkeypatch.setattr(cache_writer, wait, 0)
    return {"cache": str(tmp_path / "cache")}


@pytest.fixture
def writer(server: InProcessServer) -> Iterator[ClientStorage]:
    with client_of(server) as storage:
        yield storage


@pytest.fixture
def proxy(server: InProcessServer) -> Iterator[Proxy]:
    with proxied(server.address) as proxy:
        yield proxy


@pytest.fixture
def reader(
    server: InProcessServer, proxy: Proxy, cached: dict[str, Any]
) -> Iterator[ClientStorage]:
    """A client behind the proxy."""
    with client_of(server, addr=proxy.address, **cached) as storage:
        yield storage


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()
