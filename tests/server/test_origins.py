"""Where a peer comes from."""

import asyncio
import os
import socket

import pytest

from zeolith.server.origins import Origin, origin_of, tcp_origin


@pytest.mark.parametrize(
    ("host", "address", "source"),
    [
        ("192.0.2.7", "192.0.2.7:4567", "192.0.2.7"),
        ("2001:db8::7", "[2001:db8::7]:4567", "2001:db8::/64"),
        ("2001:db8::8:7", "[2001:db8::8:7]:4567", "2001:db8::/64"),
        ("2001:db8:0:1::7", "[2001:db8:0:1::7]:4567", "2001:db8:0:1::/64"),
        ("::ffff:192.0.2.7", "[::ffff:192.0.2.7]:4567", "192.0.2.7"),
        ("fe80::7%eth0", "[fe80::7%eth0]:4567", "fe80::/64"),
    ],
)
def test_a_host_is_counted_whatever_its_port_and_an_ipv6_network_as_one(
    host, address, source
):
    assert tcp_origin(host, 4567) == Origin(address, source)


async def test_a_user_is_counted_whatever_the_process(tmp_path):
    path = str(tmp_path / "socket")
    arrived = asyncio.get_running_loop().create_future()

    class Arriving(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            arrived.set_result(origin_of(transport))
            assert isinstance(transport, asyncio.Transport)
            transport.close()

    server = await asyncio.get_running_loop().create_unix_server(Arriving, path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        uid, gid = os.getuid(), os.getgid()
        assert await arrived == Origin(
            f"unix:pid={os.getpid()},uid={uid},gid={gid}", f"unix:uid={uid}"
        )
    server.close()
    await server.wait_closed()
