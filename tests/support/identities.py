"""Somebody of each kind, whom a test's server knows; made once, for that takes time."""

import base64
import hashlib
import socket
from functools import cache

from zeolith.protocol.credentials import Given
from zeolith.protocol.login import Login, Password, Token
from zeolith.server.access import Access, Identity, User, parse_grants
from zeolith.server.key_files import _keys

PASSWORD = "correct horse battery"
TOKEN = "0a1b2c3d.staple"


@cache
def user(name: str, roles: str, password: str = PASSWORD) -> User:
    """A user of that password."""
    made = _keys(password)
    salt, stored, server = (
        base64.b64decode(made[key]) for key in ("salt", "stored_key", "server_key")
    )
    identity = Identity("user", name, parse_grants(roles), stored)
    return User(identity, salt, stored, server, made["iterations"])


def access(
    *,
    anonymous: str = "none",
    token: str = "read",
    expires_s: float | None = None,
    **users: str,
) -> Access:
    """Roles of users by their names, of the token, and of anybody."""
    key = hashlib.sha256(TOKEN.encode()).digest()
    name = TOKEN.partition(".")[0]
    return Access(
        anonymous=parse_grants(anonymous),
        users={name: user(name, roles) for name, roles in users.items()},
        tokens={name: Identity("token", name, parse_grants(token), key, expires_s)},
        secret=b"s" * 32,
    )


def password_login(name: str, password: str = PASSWORD) -> Login:
    """An attempt of the user of that name."""
    with socket.socket(socket.AF_UNIX) as somewhere:
        return Password(name, Given(password)).login(somewhere)


def token_login(token: str = TOKEN) -> Login:
    """An attempt with a token."""
    with socket.socket(socket.AF_UNIX) as somewhere:
        return Token(Given(token)).login(somewhere)
