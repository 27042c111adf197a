"""The roles that a server gives to whoever comes, and what one includes of the others.

``methods`` names the role that each method and each operation needs; which roles
somebody has on a storage is the server's business (``zeolith.server.access``). Pure;
any thread.
"""

from collections.abc import Iterable
from enum import StrEnum


class AccessRole(StrEnum):
    """What somebody may do with a storage."""

    # Its members are keys on the way of every request.
    __hash__ = str.__hash__

    READ = "read"
    WRITE = "write"
    UNDO = "undo"
    PACK = "pack"
    ADMIN = "admin"


Roles = frozenset[AccessRole]

EVERY_ROLE: Roles = frozenset(AccessRole)
NO_ROLE: Roles = frozenset()
# Roles that change a database: a session that only reads may not use them.
CHANGING: Roles = frozenset({AccessRole.WRITE, AccessRole.UNDO, AccessRole.PACK})

_INCLUDED: dict[AccessRole, Roles] = {
    AccessRole.READ: frozenset({AccessRole.READ}),
    AccessRole.WRITE: frozenset({AccessRole.READ, AccessRole.WRITE}),
    # To undo is to commit.
    AccessRole.UNDO: frozenset({AccessRole.READ, AccessRole.WRITE, AccessRole.UNDO}),
    AccessRole.PACK: frozenset({AccessRole.READ, AccessRole.PACK}),
    AccessRole.ADMIN: EVERY_ROLE,
}
_SHARED: dict[Roles, Roles] = {}


def with_included(roles: Iterable[AccessRole]) -> Roles:
    """``roles`` and all that they include; the same set for the same roles.

    A server keeps one for each session, and there are 32 of them at most.
    """
    included = frozenset[AccessRole]().union(*(_INCLUDED[role] for role in roles))
    return _SHARED.setdefault(included, included)
