"""The addresses on which the server accepts: bound, announced, and let go.

Called on the loop. A Unix socket's file is removed at the end; a file that a dead
server left behind is replaced, one on which somebody answers is not. Nobody can
connect before it is certain that the address may be reached, and the mode of a Unix
socket is set: it is bound first, and listened to then.
"""

import asyncio
import os
import socket
import ssl
import stat
from collections.abc import Callable
from pathlib import Path

from zeolith.protocol.addresses import Address, format_address
from zeolith.server.exposure import exposed, refusal
from zeolith.server.secured import Protected, Secured

BACKLOG = 512
# Only the server's own user may connect to a Unix socket.
SOCKET_MODE = 0o600


class ListenError(Exception):
    """An address cannot be used; the text is one line that says which and why."""


class Listener:
    """The listening sockets of one server."""

    def __init__(
        self,
        protocol: Callable[[], Protected],
        tls_context: Callable[[], ssl.SSLContext] | None = None,
        *,
        may_be_exposed: bool = False,
        socket_mode: int = SOCKET_MODE,
    ):
        """``tls_context`` is asked for each socket accepted by TCP; None: no TLS."""
        self._protocol = protocol
        self._tls_context = tls_context
        self._may_be_exposed = may_be_exposed
        self._socket_mode = socket_mode
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
            self._accepted, host or None, port, backlog=BACKLOG, start_serving=False
        )
        self._servers.append(server)
        bound = [sock.getsockname()[:2] for sock in server.sockets]
        if not self._may_be_exposed:
            reachable = exposed(bound, has_tls=False, has_login=False)
            if reachable:
                raise ListenError(refusal(reachable))
        await server.start_serving()
        self.addresses += bound

    def _accepted(self) -> asyncio.Protocol:
        if self._tls_context is None:
            return self._protocol()
        return Secured(self._protocol(), self._tls_context())

    async def _listen_unix(self, path: str) -> None:
        _remove_stale(path)
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(path)
            self._paths.append(Path(path))
            os.chmod(path, self._socket_mode)
            server = await loop.create_unix_server(
                self._protocol, sock=sock, backlog=BACKLOG
            )
        except BaseException:
            sock.close()
            raise
        self._servers.append(server)
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
