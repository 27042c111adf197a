"""The hello: who comes in, as whom, and what the welcome tells.

Belongs to the loop; called by peers with hellos that protocol.methods has checked. A
session is begun here, in one step with following the changes; what a peer may do in it
was found before and stays until it ends.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from zeolith.protocol.errors import HelloRefused
from zeolith.protocol.login import SCRAM, TOKEN
from zeolith.protocol.methods import VERSION
from zeolith.protocol.roles import AccessRole
from zeolith.server.access import Access, Identity
from zeolith.server.login import Exchange, LoginFailed, by_token, subject_of
from zeolith.server.returning import is_of_history, missed_since
from zeolith.server.sessions import Session
from zeolith.storage.changes import Change

if TYPE_CHECKING:
    from zeolith.server.peer import Peer
    from zeolith.server.service import Service

logger = logging.getLogger(__name__)


# A login that failed is answered after so long: long for who guesses, short for who
# has mistyped. Less than hello_timeout_s.
FAILED_LOGIN_DELAY_S = 1.0


class Greeting:
    """Answers the hellos of one server."""

    def __init__(self, service: "Service", access: Access):
        self._service = service
        self._access = access
        # Our own, as PEM, where peers come by TLS.
        self.certificate: str | None = None
        self.failed_login_delay_s = FAILED_LOGIN_DELAY_S
        # Logins under way: the peer's hello, and what it was asked.
        self._challenged: dict[Peer, tuple[dict[str, Any], Exchange]] = {}

    def hello(self, peer: "Peer", fields: dict[str, Any]) -> None:
        """Accept, challenge or refuse a peer, now or when enough is known.

        Its fields are checked if it speaks our version.
        """
        try:
            self._check_version(fields)
            if fields["kind"] == "channel" and fields["session"] is not None:
                # It is who its stream is.
                joined = self._welcome_channel(peer, fields["session"])
                peer.welcome(joined)
                return
            identity = self._identify(peer, fields)
        except HelloRefused as refusal:
            self._refuse(peer, refusal)
        except LoginFailed as error:
            self._fail_login(peer, error)
        else:
            if identity is not None:
                peer.identity = identity
                self._greet(peer, fields)

    def response(self, peer: "Peer", text: str) -> None:
        """Welcome a peer whose response is right; refuse any other."""
        fields, exchange = self._challenged.pop(peer)
        try:
            peer.identity, proof = exchange.finish(text)
        except LoginFailed as error:
            self._fail_login(peer, error)
        else:
            self._greet(peer, fields, proof)

    def forget(self, peer: "Peer") -> None:
        """The peer is gone."""
        self._challenged.pop(peer, None)

    def tick(self) -> None:
        """End the sessions of those whose time is over."""
        now_s = time.time()
        for session in tuple(self._service.sessions.values()):
            if session.identity.is_over(now_s):
                self._end(session, f"{session.identity} has expired")

    def renew(self, access: Access) -> None:
        """Go by ``access`` from now on; sessions to which it gives other roles end."""
        self._access = access
        for session in tuple(self._service.sessions.values()):
            identity = access.renewed(session.identity)
            if identity is None:
                self._end(session, f"{session.identity} may not come in any more")
            elif identity.roles_on(session.served.name) != session.roles:
                self._end(session, f"the roles of {identity} have changed")
            else:
                # It may end at another time.
                session.identity = identity

    def _end(self, session: Session, why: str) -> None:
        logger.warning("%s: %s", session.name, why)
        del self._service.sessions[session.token]
        session.end("access", why)

    def _check_version(self, fields: dict[str, Any]) -> None:
        if fields.get("version") != VERSION:
            raise HelloRefused(
                "version",
                f"this server speaks version {VERSION} of the protocol,"
                f" the client {fields.get('version')!r:.20}",
            )
        if self._service.is_stopping:
            raise HelloRefused("stopping", "the server is stopping")

    def _check_identity(self, peer: "Peer") -> None:
        """It may have been taken away while the peer waited."""
        identity = self._access.renewed(peer.identity)
        if identity is None or identity.is_over(time.time()):
            raise HelloRefused("login", "the login failed")
        peer.identity = identity

    def _identify(self, peer: "Peer", fields: dict[str, Any]) -> Identity | None:
        """Who the peer is; None: it has been challenged."""
        access, login = self._access, fields["login"]
        if login is None:
            return access.by_subject(subject_of(peer.tls))
        way, text = login
        if way == TOKEN and access.tokens:
            return by_token(access, text, time.time())
        if way == SCRAM and access.users:
            exchange = Exchange(access, text, self._binding(peer))
            self._challenged[peer] = fields, exchange
            now = asyncio.get_running_loop().time()
            peer.send(peer.connection.challenge(exchange.challenge, now))
            return None
        raise LoginFailed(f"{way!r:.20}: nobody can log in that way")

    def _binding(self, peer: "Peer") -> str | None:
        return None if peer.tls is None else self.certificate

    def _fail_login(self, peer: "Peer", error: LoginFailed) -> None:
        """What it hears, and when, does not depend on what was wrong."""
        # Once a second: whoever guesses must not fill the log.
        self._service.admission.complain(peer, f"is not let in: {error}")
        refusal = HelloRefused("login", "the login failed")
        loop = asyncio.get_running_loop()
        loop.call_later(self.failed_login_delay_s, self._refuse, peer, refusal)

    def _refuse(self, peer: "Peer", refusal: HelloRefused) -> None:
        # Its time may be over, or the server's.
        if peer.is_there and not peer.connection.is_closed:
            logger.info("%s is refused: %s", peer.address, refusal)
            now = asyncio.get_running_loop().time()
            peer.send(peer.connection.refuse(refusal, now))

    def _greet(
        self,
        peer: "Peer",
        fields: dict[str, Any],
        proof: str | None = None,
        *,
        may_wait: bool = True,
    ) -> None:
        if not peer.is_there or peer.connection.is_closed:
            return
        try:
            self._check_version(fields)
            self._check_identity(peer)
            if fields["kind"] == "channel":
                welcome: dict[str, Any] | None = _welcome(None)
            else:
                again = partial(self._greet, peer, fields, proof, may_wait=False)
                welcome = self._welcome_stream(
                    peer, fields, again if may_wait else None
                )
        except HelloRefused as refusal:
            self._refuse(peer, refusal)
            return
        if welcome is None:
            return
        peer.welcome({**welcome, "proof": proof})
        if peer.session is not None and peer is peer.session.stream:
            # What was too much for the welcome.
            peer.session.served.catch_up(peer)

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
        self,
        peer: "Peer",
        fields: dict[str, Any],
        again: Callable[[], None] | None,
    ) -> dict[str, Any] | None:
        """What to answer; None: ``again`` will be called when it is known."""
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
        if again and is_ours and position and served.replays.may_be_told(position):
            served.replays.ask(position, again)
            return None
        session = Session(
            served,
            peer,
            identity=peer.identity,
            roles=roles,
            is_read_only=served.is_read_only or fields["read_only"],
            label=fields["label"],
            limits=self._service.limits,
        )
        peer.session = session
        self._service.sessions[session.token] = session
        missed = missed_since(served, position) if is_ours or not position else None
        # One step of the loop, from the last change that was missed to following:
        # whoever follows from here misses nothing.
        last_tid, changes = served.follow_after(peer, missed or ())
        who, name = session.identity, served.name
        logger.info("%s has come to storage %s as %s", session.name, name, who)
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
        "proof": None,
    }
