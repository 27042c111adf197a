"""The hello: who comes in, as whom, and what the welcome tells.

Belongs to the loop; called by peers with hellos that protocol.methods has checked. A
session is begun here, in one step with following the changes; what a peer may do in it
was found before and stays until it ends.
"""

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from zeolith.protocol.errors import HelloRefused
from zeolith.protocol.methods import VERSION
from zeolith.protocol.roles import AccessRole
from zeolith.server.access import Access, anonymous
from zeolith.server.returning import is_of_history, missed_since
from zeolith.server.sessions import Session
from zeolith.storage.changes import Change

if TYPE_CHECKING:
    from zeolith.server.peer import Peer
    from zeolith.server.service import Service

logger = logging.getLogger(__name__)


class Greeting:
    """Answers the hellos of one server."""

    def __init__(self, service: "Service", access: Access):
        self._service = service
        self._access = access

    def hello(self, peer: "Peer", fields: dict[str, Any]) -> None:
        """Accept or refuse a peer, now or when it is known what it has missed.

        Its fields are checked if it speaks our version.
        """
        self._greet(peer, fields, may_wait=True)

    def renew(self, access: Access) -> None:
        """Go by ``access`` from now on; sessions that it gives other roles end."""
        self._access = access
        for token, session in tuple(self._service.sessions.items()):
            identity = access.renewed(session.identity)
            if identity.roles_on(session.served.name) != session.roles:
                del self._service.sessions[token]
                logger.warning("%s: its roles have changed", session.name)
                session.end("access", "what this client may do has changed")

    def _greet(self, peer: "Peer", fields: dict[str, Any], *, may_wait: bool) -> None:
        if not peer.is_there:
            return
        try:
            welcome = self._welcome(peer, fields, may_wait)
        except HelloRefused as refusal:
            logger.info("%s is refused: %s", peer.address, refusal)
            now = asyncio.get_running_loop().time()
            peer.send(peer.connection.refuse(refusal, now))
            return
        if welcome is None:
            return
        peer.welcome(welcome)
        if peer.session is not None and peer is peer.session.stream:
            # What was too much for the welcome.
            peer.session.served.catch_up(peer)

    def _welcome(
        self, peer: "Peer", fields: dict[str, Any], may_wait: bool
    ) -> dict[str, Any] | None:
        """What to answer to a hello; None: it will be asked again."""
        if fields.get("version") != VERSION:
            raise HelloRefused(
                "version",
                f"this server speaks version {VERSION} of the protocol,"
                f" the client {fields.get('version')!r:.20}",
            )
        if self._service.is_stopping:
            raise HelloRefused("stopping", "the server is stopping")
        if fields["kind"] == "channel" and fields["session"] is not None:
            return self._welcome_channel(peer, fields["session"])
        peer.identity = anonymous(self._access.anonymous)
        if fields["kind"] == "channel":
            return _welcome(None)
        return self._welcome_stream(peer, fields, may_wait)

    def _welcome_channel(self, peer: "Peer", token: bytes) -> dict[str, Any]:
        session = self._service.sessions.get(token)
        if session is None:
            raise HelloRefused("session", "the session has ended")
        self._service.admission.admit_channel(peer, session)
        peer.session = session
        peer.identity = session.identity
        peer.answer = session.served.answer
        session.channels.add(peer)
        return _welcome(None)

    def _welcome_stream(
        self, peer: "Peer", fields: dict[str, Any], may_wait: bool
    ) -> dict[str, Any] | None:
        served = self._service.databases.get(fields["storage"])
        roles = peer.identity.roles_on(fields["storage"] or "")
        if AccessRole.READ not in roles:
            # Whether there is such a storage is not for everybody to know.
            raise HelloRefused(
                "access",
                f"{peer.identity} has no role on storage {fields['storage']!r}",
            )
        if served is None:
            names = ", ".join(map(repr, self._service.databases))
            raise HelloRefused(
                "storage",
                f"there is no storage {fields['storage']!r} here, only {names}",
            )
        if served.is_starting_afresh:
            raise HelloRefused("stopping", f"storage {served.name!r} starts afresh")
        if served.is_read_only and not fields["read_only"]:
            raise HelloRefused(
                "read-only",
                f"storage {served.name!r} is read-only here; connect with read_only,"
                " or with read_only_fallback",
            )
        position = fields["position"]
        is_ours = is_of_history(served, fields)
        if may_wait and is_ours and position and served.replays.may_be_told(position):
            again = partial(self._greet, peer, fields, may_wait=False)
            served.replays.ask(position, again)
            return None
        session = Session(
            served,
            peer,
            identity=peer.identity,
            roles=roles,
            is_read_only=served.is_read_only or fields["read_only"],
            label=fields["label"],
        )
        peer.session = session
        self._service.sessions[session.token] = session
        missed = missed_since(served, position) if is_ours or not position else None
        # One step of the loop, from the last change that was missed to following:
        # whoever follows from here misses nothing.
        last_tid, changes = served.follow_after(peer, missed or ())
        logger.info("%s has come to storage %s", session.name, served.name)
        return _welcome(session, last_tid, None if missed is None else changes)


def _welcome(
    session: Session | None,
    last_tid: bytes | None = None,
    changes: list[Change] | None = None,
) -> dict[str, Any]:
    """The fields of a Welcome; a channel's says only that it is accepted."""
    served = session.served if session else None
    database = served.database if served else None
    return {
        "version": VERSION,
        "capabilities": [],
        "session": session.token if session else None,
        "database_id": database.database_id if database else None,
        "epoch": database.epoch if database else None,
        "last_tid": last_tid,
        "changes": changes,
        "name": database.name if database else None,
        "size": served.size if served else None,
        "length": served.length if served else None,
        "interfaces": list(database.interfaces) if database else [],
        "supports_undo": database.supports_undo if database else False,
        "read_only": session.is_read_only if session else True,
        "roles": sorted(session.roles) if session else [],
    }
