"""The addresses on which the server accepts: bound, announced, and let go.

Called on the loop. A Unix socket's file is removed at the end; a file that a dead
server left behind is replaced, one on which somebody answers is not.
"""

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from zeolith.protocol.addresses import Address, format_address

BACKLOG = 512


class ListenError(Exception):
    """An address cannot be used; the text is one line that says which and why."""


class Listener:
    """The listening sockets of one server."""

    def __init__(self, protocol: Callable[[], asyncio.BaseProtocol]):
        self._protocol = protocol
        self._servers: list[asyncio.Server] = []
        self._paths: list[Path] = []
        # Where clients really reach us: port 0 has become a port.
        self.addresses: list[Address] = []

    async def listen(self, address: Address) -> None:
        """Accept on ``address`` from now on; raises ListenError."""
        try:
            if isinstance(address, str):
                await self._listen_unix(address)
            else:
                await self._listen_tcp(*address)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ListenError(
                f"cannot listen on {format_address(address)}: {reason}"
            ) from error

    async def close(self) -> None:
        """Accept no more; sockets accepted already go on."""
        for server in self._servers:
            server.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._servers.clear()
        self._paths.clear()

    async def _listen_tcp(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            self._protocol, host or None, port, backlog=BACKLOG
        )
        self._servers.append(server)
        for sock in server.sockets:
            self.addresses.append(sock.getsockname()[:2])

    async def _listen_unix(self, path: str) -> None:
        _remove_stale(path)
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(self._protocol, path, backlog=BACKLOG)
        self._servers.append(server)
        self._paths.append(Path(path))
        self.addresses.append(path)


def _remove_stale(path: str) -> None:
    """Remove a socket on which nobody listens; raises OSError if somebody does."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(17, "a file of that name is there, and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(98, "another server listens there")
