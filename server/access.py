"""Who somebody is, what that lets him do, and the one place where this is checked.

An ``Identity`` is found at the hello; ``roles_on`` says what it may do with a storage,
and a session keeps these roles. ``permit`` compares them with what the tables of the
protocol say of a call, before any code of a method runs. Pure; the loop's.

A *grant* is a role on one storage or on all, written ``ROLE`` or ``ROLE@STORAGE``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ZODB.POSException import ReadOnlyError

from zeolith.protocol.errors import Forbidden, LocalProtocolError, WriteForbidden
from zeolith.protocol.methods import METHODS, roles_of_call
from zeolith.protocol.roles import (
    CHANGING,
    EVERY_ROLE,
    AccessRole,
    Roles,
    with_included,
)

NOTHING = "none"
# Of the derivation of what is kept of a password: some 50 ms of whoever logs in.
ITERATIONS = 100_000


@dataclass(frozen=True, slots=True)
class Grant:
    """A role on ``storage``; None: on every one."""

    role: AccessRole
    storage: str | None = None

    def __str__(self) -> str:
        return self.role if self.storage is None else f"{self.role}@{self.storage}"


Grants = tuple[Grant, ...]
EVERYTHING: Grants = (Grant(AccessRole.ADMIN),)


def parse_grant(text: str) -> Grant:
    """The grant that ``text`` is; raises ValueError with a sentence."""
    role, at, storage = text.partition("@")
    if role not in tuple(AccessRole):
        raise ValueError(f"{role!r} is no role; there are {', '.join(AccessRole)}")
    if at and not storage:
        raise ValueError(f"{text!r} names no storage after the @")
    return Grant(AccessRole(role), storage or None)


def parse_grants(text: str) -> Grants:
    """The grants in ``text``, between spaces or commas; "none" is none."""
    words = text.replace(",", " ").split()
    if words == [NOTHING]:
        return ()
    if not words:
        raise ValueError(f"no role is named; {NOTHING!r} is for none")
    return tuple(map(parse_grant, words))


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a peer is, as far as the server is convinced of it."""

    # How it is known: anonymous, user, token or certificate.
    kind: str
    name: str
    grants: Grants
    # What was proved: when it is another, the proof is worth nothing any more.
    key: bytes = field(default=b"", repr=False)
    # Seconds since 1970, if it ends some day.
    expires_s: float | None = None

    def is_over(self, now_s: float) -> bool:
        """Whether it has ended."""
        return self.expires_s is not None and self.expires_s <= now_s

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name else self.kind

    def roles_on(self, storage: str) -> Roles:
        """What it may do with the storage of that name."""
        return with_included(
            grant.role for grant in self.grants if grant.storage in (None, storage)
        )

    def roles_anywhere(self, storages: Iterable[str]) -> Roles:
        """What it may do with at least one of ``storages``."""
        return frozenset[AccessRole]().union(*map(self.roles_on, storages))


def anonymous(grants: Grants) -> Identity:
    """Whoever does not say who he is, and may do what ``grants`` say."""
    return Identity("anonymous", "", grants)


NOBODY = anonymous(())


def permit(
    name: str, args: list[Any], roles: Roles, *, in_session: bool, is_read_only: bool
) -> None:
    """Raise unless a peer that has ``roles`` may make this call, which was checked.

    Forbidden if a role is missing, ReadOnlyError if the session only reads whatever
    its roles are, LocalProtocolError without the session that the method needs.
    """
    method = METHODS[name]
    if method.needs_session and not in_session:
        raise LocalProtocolError(f"{name} needs a session")
    role = method.role
    if role is None:
        return
    if role not in roles:
        raise _forbidden(name, role, roles)
    if is_read_only and role in CHANGING:
        raise ReadOnlyError("this connection is read-only")
    if role is AccessRole.WRITE and roles != EVERY_ROLE:
        missing = roles_of_call(name, args) - roles
        if missing:
            raise _forbidden(f"what is in this {name}", min(missing), roles)


def _forbidden(name: str, role: AccessRole, roles: Roles) -> Forbidden:
    text = f"{name} needs the role {role}, which this client does not have"
    if role in CHANGING and not roles & CHANGING:
        return WriteForbidden(f"{text}: it may only read")
    return Forbidden(text)


@dataclass(frozen=True, slots=True)
class User:
    """Who a user is, and what is kept of his password: see RFC 5802."""

    identity: Identity
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)
    iterations: int


@dataclass(frozen=True)
class Access:
    """All that is known of those who may come; never changed, only replaced."""

    # Whoever says nothing of himself.
    anonymous: Grants = ()
    # By the subject of their certificate.
    certificates: Mapping[str, Identity] = field(default_factory=dict)
    users: Mapping[str, User] = field(default_factory=dict)
    # By their public part.
    tokens: Mapping[str, Identity] = field(default_factory=dict)
    # Of it is made what an unknown user is asked; the same after a restart.
    secret: bytes = field(default=b"", repr=False)
    # Of an unknown user's password.
    iterations: int = ITERATIONS

    def by_subject(self, subject: str | None) -> Identity:
        """Who has shown a certificate of that subject, or None, and says no more."""
        known = None if subject is None else self.certificates.get(subject)
        return anonymous(self.anonymous) if known is None else known

    def renewed(self, identity: Identity) -> Identity | None:
        """What somebody who came as ``identity`` is now; None: nobody any more."""
        known: Identity | None
        if identity.kind == "user":
            user = self.users.get(identity.name)
            known = None if user is None else user.identity
        elif identity.kind == "token":
            known = self.tokens.get(identity.name)
        elif identity.kind == "certificate":
            known = self.certificates.get(identity.name)
        else:
            known = anonymous(self.anonymous)
        return known if known is not None and known.key == identity.key else None


# Everybody may do everything, as long as nothing else was said.
OPEN = Access(EVERYTHING)
