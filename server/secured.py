"""TLS between an accepted socket and its peer: what is read and written is encrypted.

Called by the loop only. A ``Secured`` is a protocol to the socket's transport and a
transport to the peer. It keeps nothing back: what a peer writes is encrypted at once
and waits, if it must, in the socket's transport, so that the peer's bounds hold for
what is really waiting; what has come is decrypted at once and handed on in one piece.

A handshake takes the processor longer than anything else that a stranger may ask for.
It is charged to him like the rest, and waits in line when much was taken (turns).

The loop's own TLS (``create_server(ssl=...)``) is not used, for it tells a protocol of
a socket only after the handshake, so that no bound of ours would hold before it; and
it drops the alert that tells a client why it was refused.
"""

import asyncio
import logging
import ssl
from contextlib import suppress
from typing import Any, cast

from zeolith.protocol.codec import encode
from zeolith.protocol.errors import HelloRefused, failure_of
from zeolith.protocol.messages import Failure
from zeolith.server.turns import Waiting, computed

logger = logging.getLogger(__name__)

# More than this is not in a record of TLS (RFC 8446, section 5.1).
_READ_BYTES = 16 * 1024
# What is encrypted in one go.
_WRITE_BYTES = 1024 * 1024
# The first byte of whoever begins a handshake; a frame of ours that begins so would be
# larger than any hello may be.
_HANDSHAKE = 0x16


class Protected(asyncio.Protocol):
    """What a socket's bytes are for: a peer."""

    def complain(self, text: str) -> None:
        """Log what is wrong with whoever is at the other end."""
        logger.warning("a client %s", text)

    def puts_in_line(self, _who: Waiting) -> bool:
        """Whether ``_who``, which acts for it, is to wait for a turn, and has one."""
        return False

    def charge(self, took_s: float) -> None:
        """So much of the server's time was taken for it."""


class Secured(asyncio.Protocol, asyncio.Transport):
    """One accepted socket on which TLS is spoken."""

    def __init__(self, peer: Protected, context: ssl.SSLContext):
        super().__init__()
        self._peer = peer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._has_begun = self._is_ready = False
        # In line, and nothing is read.
        self._is_waiting = False
        self._transport: asyncio.Transport

    # For the socket's transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is accepted; the peer's time for its hello begins."""
        self._transport = cast(asyncio.Transport, transport)
        self._peer.connection_made(self)

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        if not self._has_begun:
            self._has_begun = True
            if data[0] != _HANDSHAKE:
                self._refuse_plain()
                return
        self._incoming.write(data)
        if self._is_ready:
            self._read()
        elif not self._is_waiting:
            self._is_waiting = self._peer.puts_in_line(self)
            if self._is_waiting:
                self._transport.pause_reading()
            else:
                self._read()

    def take_turn(self) -> None:
        """Go on with the handshake: it waited in line for that."""
        self._is_waiting = False
        if not self._transport.is_closing():
            self._transport.resume_reading()
            self._read()

    def _read(self) -> None:
        """Go on with what has come."""
        try:
            if not self._is_ready:
                self._shake_hands()
            received, is_over = self._decrypted()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._fail(error)
            return
        # Tickets for the next sockets, an answer to a change of keys.
        self._flush()
        if received:
            self._peer.data_received(received)
        if is_over:
            self.close()

    def pause_writing(self) -> None:
        """More waits in the socket's transport than the peer has said."""
        self._peer.pause_writing()

    def resume_writing(self) -> None:
        """Most of it has gone."""
        self._peer.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, for whatever reason."""
        self._is_ready = False
        self._peer.connection_lost(exc)

    # For the peer

    def write(self, data: Any) -> None:
        """Send ``data``; nothing goes before the handshake, not even why it ends."""
        if not self._is_ready or self._transport.is_closing():
            return
        if len(data) <= _WRITE_BYTES:
            self._tls.write(data)
            self._transport.write(self._outgoing.read())
            return
        view = memoryview(data)
        for start in range(0, len(view), _WRITE_BYTES):
            self._tls.write(view[start : start + _WRITE_BYTES])
            self._transport.write(self._outgoing.read())

    def close(self) -> None:
        """Close when all was sent, and say that it is the end."""
        if not self._transport.is_closing():
            if self._is_ready:
                # It wants to hear the same from the client, who may be gone.
                with suppress(ssl.SSLError):
                    self._tls.unwrap()
                self._flush()
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether it was closed, or is lost."""
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        """Hand nothing on until ``resume_reading``."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self._transport.resume_reading()

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        """As of the socket's transport."""
        self._transport.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """How many encrypted bytes wait."""
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As of the socket's transport; ``ssl_object`` is ours."""
        if name == "ssl_object":
            return self._tls
        return self._transport.get_extra_info(name, default)

    def _shake_hands(self) -> None:
        began_s = computed()
        try:
            self._tls.do_handshake()
        finally:
            self._peer.charge(computed() - began_s)
        self._is_ready = True

    def _decrypted(self) -> tuple[bytes, bool]:
        """What has come, and whether the client has said that it was the last."""
        pieces: list[bytes] = []
        # What is read is a whole record, or it has not come yet.
        while self._incoming.pending:
            try:
                piece = self._tls.read(_READ_BYTES)
            except ssl.SSLWantReadError:
                break
            if not piece:
                return b"".join(pieces), True
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), False

    def _flush(self) -> None:
        if self._outgoing.pending and not self._transport.is_closing():
            self._transport.write(self._outgoing.read())

    def _fail(self, error: ssl.SSLError) -> None:
        text = getattr(error, "verify_message", None) or error.reason or error
        self._peer.complain(f"is disconnected: {text}")
        # The alert, which tells the client why.
        self._flush()
        self._is_ready = False
        self._transport.close()

    def _refuse_plain(self) -> None:
        text = "this server speaks TLS: connect with it (tls, or tls_ca)"
        self._peer.complain("is disconnected: it speaks no TLS")
        refusal = HelloRefused("tls", text)
        name, attributes, text = failure_of(refusal)
        self._transport.write(encode(Failure(0, name, attributes, text)))
        self._transport.close()
