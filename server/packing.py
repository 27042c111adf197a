"""Packing, as the wire has it: begin one, look at it, give it up.

Belongs to the loop. A pack runs in a thread that is there for nothing else
(``Workers.aside``), one at a time for each database; it belongs to the database, not to
whoever asked for it: it goes on when that client is gone. What it does is the
storage's business (``storage.packing``).
"""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ZODB.FileStorage.FileStorage import FileStorageError

from zeolith.protocol.errors import ShuttingDown
from zeolith.server.served import Served
from zeolith.storage.pack_progress import PackCancelled, Packed, Packing

if TYPE_CHECKING:
    from zeolith.server.peer import Peer
    from zeolith.server.service import Service

logger = logging.getLogger(__name__)

Fail = Callable[["Peer", int, str, BaseException], None]


class Packs:
    """The packs of a server's databases; see the methods of the wire."""

    def __init__(self, service: "Service", *, later: object, fail: Fail):
        """``later`` is what a handler returns that answers later."""
        self._service = service
        self._later = later
        self._fail = fail
        self.handlers: dict[str, Callable[..., Any]] = {
            "pack": self._pack,
            "pack_progress": self._pack_progress,
            "pack_cancel": self._pack_cancel,
        }

    def give_up(self, reason: str) -> None:
        """End all packs that can be ended; their clients are told ``reason``."""
        for served in self._service.databases.values():
            if served.packing is not None:
                served.packing.cancel(reason)

    def _pack(
        self, peer: "Peer", number: int, time_s: float, gc: bool | None
    ) -> object:
        assert peer.session is not None
        served = peer.session.served
        if self._service.is_stopping:
            raise ShuttingDown("the server is stopping")
        if served.packing is not None:
            raise FileStorageError(
                f"storage {served.name} is being packed already, for"
                f" {served.packing.who}"
            )
        packing = served.packing = Packing(peer.session.name)
        logger.info("%s packs storage %s", packing.who, served.name)

        def done(ended: "asyncio.Future[Packed]") -> None:
            served.packing = None
            if ended.cancelled():
                # The server has stopped, and the peer was told so.
                return
            error = ended.exception()
            if error is None:
                _log(served, ended.result())
                peer.reply(number, tuple(ended.result()))
            else:
                _log_failure(served, error)
                self._fail(peer, number, "pack", error)

        pack = served.database.pack
        served.workers.aside(pack, time_s, gc, packing).add_done_callback(done)
        return self._later

    def _pack_progress(self, peer: "Peer", _number: int) -> dict[str, Any] | None:
        assert peer.session is not None
        packing = peer.session.served.packing
        return None if packing is None else packing.describe()

    def _pack_cancel(self, peer: "Peer", _number: int) -> bool:
        assert peer.session is not None
        session = peer.session
        packing = session.served.packing
        if packing is None:
            return False
        return packing.cancel(f"the pack was cancelled by {session.name}")


def _log(served: Served, packed: Packed) -> None:
    if packed.has_changed:
        logger.info(
            "storage %s is packed: %d bytes, before it was %d",
            served.name,
            packed.size_after,
            packed.size_before,
        )
    else:
        logger.info("storage %s has nothing to pack", served.name)


def _log_failure(served: Served, error: BaseException) -> None:
    level = logging.INFO if isinstance(error, PackCancelled) else logging.WARNING
    logger.log(level, "storage %s was not packed: %s", served.name, error)
