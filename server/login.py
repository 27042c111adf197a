"""Proving who a peer is: the server's side of a login, without a socket.

Belongs to the loop, and is quick: what is kept of a password has been derived from it
when it was set, so a login takes a few hashes. ``by_token`` and the ``Exchange`` of a
password give an Identity, or raise LoginFailed, whose text is for the log alone: a
peer hears the same whatever was wrong.
"""

import hmac
import ssl
from hashlib import sha256
from typing import Any

from zeolith.protocol.login import BINDING_NAME, BOUND_MECHANISM, MECHANISM
from zeolith.server.access import Access, Identity

SALT_BYTES = 16


class LoginFailed(Exception):
    """Nobody we know; the text says who it wanted to be and why it is not believed."""


def by_token(access: Access, token: str, now_s: float) -> Identity:
    """Who has ``token``; ``now_s`` is of the clock on the wall. Raises LoginFailed."""
    name, _point, _secret = token.partition(".")
    known = access.tokens.get(name)
    given = sha256(token.encode(errors="replace")).digest()
    if known is None or not hmac.compare_digest(known.key, given):
        raise LoginFailed(f"token {name!r:.80}: no token of ours")
    if known.is_over(now_s):
        raise LoginFailed(f"{known}: it has expired")
    return known


class Exchange:
    """A peer that wants to be a user, between its hello and its response."""

    def __init__(self, access: Access, first: str, binding: str | None):
        """``first`` is the peer's, ``binding`` our certificate (PEM) if it came by TLS.

        Raises LoginFailed.
        """
        from scramp import ScramException, ScramMechanism

        self._error = ScramException
        self._access = access
        self._user = "?"
        mechanism = MECHANISM if binding is None else BOUND_MECHANISM
        try:
            self._server = ScramMechanism(mechanism).make_server(
                self._keys_of,
                channel_binding=None if binding is None else (BINDING_NAME, binding),
            )
            self._server.set_client_first(first)
            self.challenge: str = self._server.get_server_first()
        except (ScramException, ValueError) as error:
            raise self._failed(error) from error

    def finish(self, response: str) -> tuple[Identity, str]:
        """Who the peer is, and the proof that we are who we are; raises LoginFailed."""
        try:
            self._server.set_client_final(response)
            proof: str = self._server.get_server_final()
        except (self._error, ValueError) as error:
            raise self._failed(error) from error
        known = self._access.users.get(self._user)
        if known is None:
            raise LoginFailed(f"user {self._user!r:.80}: no user of ours")
        return known.identity, proof

    def _keys_of(self, user: str) -> tuple[bytes, bytes, bytes, int]:
        """What is kept of the user's password, or of that of one who is not there."""
        self._user = user
        access = self._access
        # The same salt each time, as a user has, and keys that fit no password.
        salt = _derived(access.secret, b"salt", user)[:SALT_BYTES]
        key = _derived(access.secret, b"key", user)
        known = access.users.get(user)
        if known is None:
            return salt, key, key, access.iterations
        return known.salt, known.stored_key, known.server_key, known.iterations

    def _failed(self, error: Exception) -> LoginFailed:
        who = "no user of ours" if self._user not in self._access.users else error
        return LoginFailed(f"user {self._user!r:.80}: {who}")


def _derived(secret: bytes, what: bytes, name: str) -> bytes:
    return hmac.digest(secret, what + b"\0" + name.encode(errors="replace"), sha256)


def subject_of(tls: ssl.SSLObject | None) -> str | None:
    """The subject of the certificate that the peer has shown and that was verified."""
    certificate: Any = None if tls is None else tls.getpeercert()
    if not certificate:
        return None
    return ",".join(
        f"{_SHORT.get(name, name)}={_escaped(value)}"
        for part in certificate["subject"]
        for name, value in part
    )


_SHORT = {
    "commonName": "CN",
    "countryName": "C",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "domainComponent": "DC",
    "userId": "UID",
}


def _escaped(value: str) -> str:
    # Or a name with a comma in it could be that of somebody else.
    return value.replace("\\", "\\\\").replace(",", "\\,").replace("=", "\\=")
