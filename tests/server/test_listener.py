import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator

import pytest

from zeolith.server.listener import Listener, ListenError
from zeolith.server.secured import Protected

from ..support.certificates import HOST, Authority, context_of


class Greeter(Protected):
    """Says that it is there, and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"here")
        transport.close()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = Listener(Greeter)
    yield listener
    await listener.close()


async def greeting(address: object) -> bytes:
    if isinstance(address, str):
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        assert isinstance(address, tuple)
        reader, writer = await asyncio.open_connection(*address)
    said = await reader.read()
    writer.close()
    await writer.wait_closed()
    return said


async def test_port_0_is_a_free_port_that_is_told(listener):
    await listener.listen(("127.0.0.1", 0))
    ((host, port),) = listener.addresses
    assert host == "127.0.0.1"
    assert await greeting((host, int(port))) == b"here"


async def test_several_addresses_are_listened_to(listener, tmp_path):
    await listener.listen(("127.0.0.1", 0))
    await listener.listen(("127.0.0.1", 0))
    await listener.listen(str(tmp_path / "socket"))
    assert len(set(listener.addresses)) == 3
    for address in listener.addresses:
        assert await greeting(address) == b"here"


async def test_nobody_is_accepted_after_the_end(listener, tmp_path):
    path = str(tmp_path / "socket")
    await listener.listen(("127.0.0.1", 0))
    await listener.listen(path)
    addresses = list(listener.addresses)
    await listener.close()
    assert os.listdir(tmp_path) == []
    for address in addresses:
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            await greeting(address)
    await listener.close()


async def test_who_was_accepted_before_the_end_goes_on(tmp_path):
    class Echo(Protected):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            assert isinstance(self.transport, asyncio.Transport)
            self.transport.write(data)
            self.transport.close()

    listener = Listener(Echo)
    await listener.listen(("127.0.0.1", 0))
    (address,) = listener.addresses
    reader, writer = await asyncio.open_connection(*address)
    # An answer proves that the server has accepted us.
    other_reader, other_writer = await asyncio.open_connection(*address)
    other_writer.write(b"first")
    assert await other_reader.read() == b"first"
    other_writer.close()
    await other_writer.wait_closed()
    await listener.close()
    writer.write(b"still there?")
    assert await reader.read() == b"still there?"
    writer.close()
    await writer.wait_closed()


async def test_an_address_in_use_is_named(listener):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = other.getsockname()
        with pytest.raises(ListenError) as raised:
            await listener.listen(address)
    assert str(raised.value).startswith(f"cannot listen on 127.0.0.1:{address[1]}: ")
    assert "in use" in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_a_name_that_nobody_knows_is_told(listener):
    with pytest.raises(ListenError, match=r"no-such-host\.invalid"):
        await listener.listen(("no-such-host.invalid", 0))


async def test_the_socket_of_a_dead_server_is_replaced(listener, tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    await listener.listen(path)
    assert await greeting(path) == b"here"


async def test_the_socket_of_a_living_server_is_left_alone(listener, tmp_path):
    path = str(tmp_path / "socket")
    await listener.listen(path)
    other = Listener(Greeter)
    with pytest.raises(ListenError, match="another server listens there"):
        await other.listen(path)
    await other.close()
    assert await greeting(path) == b"here"


async def test_a_file_that_is_no_socket_is_left_alone(listener, tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ListenError, match="no socket"):
        await listener.listen(str(path))
    assert path.read_text() == "data"


async def test_an_address_that_strangers_reach_is_refused(listener):
    with pytest.raises(ListenError, match="insecure true"):
        await listener.listen(("0.0.0.0", 0))
    assert not listener.addresses
    await listener.listen(("127.0.0.1", 0))


async def test_nobody_can_connect_before_the_refusal(listener, monkeypatch):
    tried: list[int] = []

    def exposed(bound, **_protection):
        with socket.socket() as sock:
            tried.append(sock.connect_ex(bound[0]))
        return bound

    monkeypatch.setattr("zeolith.server.listener.exposed", exposed)
    with pytest.raises(ListenError):
        await listener.listen(("127.0.0.1", 0))
    assert tried == [errno.ECONNREFUSED]


async def test_an_address_that_strangers_reach_may_be_allowed():
    listener = Listener(Greeter, may_be_exposed=True)
    await listener.listen(("0.0.0.0", 0))
    (address,) = listener.addresses
    assert await greeting(("127.0.0.1", address[1])) == b"here"
    await listener.close()


@pytest.mark.parametrize("umask", [0o000, 0o077])
@pytest.mark.parametrize("mode", [None, 0o660, 0o666])
async def test_a_unix_socket_has_its_mode_whatever_the_umask(tmp_path, mode, umask):
    path = str(tmp_path / "socket")
    options = {} if mode is None else {"socket_mode": mode}
    listener = Listener(Greeter, **options)
    before = os.umask(umask)
    try:
        await listener.listen(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == (mode or 0o600)
    assert await greeting(path) == b"here"
    await listener.close()


async def test_a_folder_that_is_not_there_is_told(listener, tmp_path):
    with pytest.raises(ListenError, match="nowhere"):
        await listener.listen(str(tmp_path / "nowhere" / "socket"))


async def test_tcp_is_encrypted_and_a_unix_socket_is_not(tmp_path):
    authority = Authority(tmp_path)
    context = context_of(authority.sign())
    listener = Listener(Greeter, lambda: context)
    path = str(tmp_path / "socket")
    await listener.listen(("127.0.0.1", 0))
    await listener.listen(path)
    tcp, _unix = listener.addresses
    assert await greeting(path) == b"here"
    # Nothing is said before the handshake.
    assert await greeting(tcp) == b""
    await listener.close()


async def test_whoever_comes_next_is_shown_the_certificate_of_now(tmp_path):
    authority = Authority(tmp_path)
    contexts = [context_of(authority.sign("first")), context_of(authority.sign())]
    listener = Listener(Protected, lambda: contexts[0])
    await listener.listen(("127.0.0.1", 0))
    (address,) = listener.addresses
    host, port = address[0], int(address[1])
    first = await asyncio.open_connection(
        host, port, ssl=authority.trusting().context, server_hostname="first"
    )
    del contexts[0]
    second = await asyncio.open_connection(
        host, port, ssl=authority.trusting().context, server_hostname=HOST
    )
    for _reader, writer in (first, second):
        writer.close()
    await listener.close()
