"""The table of everything that can be asked over the wire; a table, no behaviour.

``METHODS`` says of each method: its arguments, who may send it, whether it is
answered, the role that it needs (None: anybody's), and whether it needs a session;
``OPERATION_ROLES`` says which operations of a transaction need more than to write. The
server checks every request against it before any code of a method runs; ``README.md``
is checked against it by a test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zeolith.protocol.errors import RemoteProtocolError
from zeolith.protocol.roles import NO_ROLE, AccessRole, Roles

VERSION = 1


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of argument: how the specification calls it, and its check."""

    name: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table."""

    name: str
    arguments: tuple[tuple[str, Kind], ...]
    role: AccessRole | None
    answers: bool = True
    needs_session: bool = True
    sender: str = "client"

    def check(self, args: list[Any]) -> None:
        """Raise RemoteProtocolError unless ``args`` fit the table."""
        if len(args) != len(self.arguments):
            raise RemoteProtocolError(
                f"{self.name} takes {len(self.arguments)} arguments, not {len(args)}"
            )
        # Of the same length: that was just seen.
        for value, (name, kind) in zip(args, self.arguments, strict=False):
            if not kind.accepts(value):
                what = "another" if type(value) is list else type(value).__name__
                raise RemoteProtocolError(
                    f"{self.name}: {name} must be {kind.name}, not {what}"
                )


def _is_id(value: Any) -> bool:
    return type(value) is bytes and len(value) == 8


def _is_operation(value: Any) -> bool:
    if type(value) is not list or not value or type(value[0]) is not str:
        return False
    if value[0] == "store" and len(value) == 4:
        # What the table says, for most of what there is to check is this.
        _name, oid, tid, data = value
        return (
            type(oid) is bytes
            and len(oid) == 8
            and type(tid) is bytes
            and len(tid) == 8
            and type(data) is bytes
        )
    fields = OPERATIONS.get(value[0])
    return fields is not None and (
        len(value) == len(fields) + 1
        and all(
            kind.accepts(each) for each, kind in zip(value[1:], fields, strict=True)
        )
    )


def optional(kind: Kind) -> Kind:
    """A kind that also accepts nil."""
    return Kind(
        f"{kind.name} or nil", lambda value: value is None or kind.accepts(value)
    )


def list_of(kind: Kind) -> Kind:
    """A list in which each element is of ``kind``."""
    return Kind(
        f"list of {kind.name}",
        lambda value: type(value) is list and all(map(kind.accepts, value)),
    )


OID = Kind("oid", _is_id)
TID = Kind("tid", _is_id)
BYTES = Kind("bytes", lambda value: type(value) is bytes)
TEXT = Kind("text", lambda value: type(value) is str)
COUNT = Kind("count", lambda value: type(value) is int and value >= 0)
BOOL = Kind("bool", lambda value: type(value) is bool)
TIME = Kind(
    "time", lambda value: type(value) in (int, float) and 0 <= value < 4_000_000_000
)
TRANSACTION_ID = Kind(
    "transaction id", lambda value: type(value) is bytes and len(value) == 16
)
TOKEN = Kind("token", lambda value: type(value) is bytes and len(value) == 16)

# What a transaction is made of, in the order in which the application did it.
OPERATIONS: dict[str, tuple[Kind, ...]] = {
    "store": (OID, TID, BYTES),
    "check": (OID, TID),
    "undo": (TID,),
    "restore": (OID, TID, optional(BYTES), optional(TID)),
    "delete": (OID, TID),
    "store_blob": (OID, TID, BYTES, COUNT),
    "store_shared_blob": (OID, TID, BYTES, TEXT),
    "restore_blob": (OID, TID, BYTES, optional(TID), COUNT),
}
OPERATION = Kind("operation", _is_operation)
RESOLUTION = Kind(
    "[oid, bytes]",
    lambda value: (
        type(value) is list
        and len(value) == 2
        and _is_id(value[0])
        and type(value[1]) is bytes
    ),
)


def _is_revision(value: Any) -> bool:
    # Spelled out: a client may have very many of them.
    if type(value) is not list or len(value) != 2:
        return False
    oid, tid = value
    return type(oid) is bytes and len(oid) == 8 and type(tid) is bytes and len(tid) == 8


REVISION = Kind("[oid, tid]", _is_revision)


def _is_metadata(value: Any) -> bool:
    if type(value) is not list or len(value) != 5:
        return False
    user, description, extension, tid, status = value
    return (
        type(user) is type(description) is type(extension) is bytes
        and (tid is None or _is_id(tid))
        and type(status) is str
    )


# user, description, extension bytes, tid (to keep that of a copied transaction), status
METADATA = Kind("metadata", _is_metadata)


def _is_change(value: Any) -> bool:
    # Spelled out: every client checks every change of every other one.
    if type(value) is not list or len(value) != 4:
        return False
    since, tid, oids, transaction = value
    if not (
        type(since) is bytes
        and len(since) == 8
        and type(tid) is bytes
        and len(tid) == 8
        and type(oids) is list
    ):
        return False
    for oid in oids:
        if type(oid) is not bytes or len(oid) != 8:
            return False
    return transaction is None or (
        type(transaction) is bytes and len(transaction) == 16
    )


# since, tid, oids, the id that its client chose
CHANGE = Kind("change", _is_change)


def _is_login(value: Any) -> bool:
    return (
        type(value) is list
        and len(value) == 2
        and type(value[0]) is type(value[1]) is str
    )


# A way to log in, and what it begins with.
LOGIN = Kind("[text, text]", _is_login)

# The fields of a Hello; those of a channel are the last.
HELLO: dict[str, Kind] = {
    "version": COUNT,
    "capabilities": list_of(TEXT),
    "kind": TEXT,
    "storage": optional(TEXT),
    "database_id": optional(BYTES),
    "epoch": optional(COUNT),
    "position": optional(TID),
    "read_only": BOOL,
    "label": optional(TEXT),
    "session": optional(TOKEN),
    "login": optional(LOGIN),
}


def hello_fields(**fields: Any) -> dict[str, Any]:
    """The fields of a Hello of this version: ``fields``, and nothing for the others."""
    return {
        "version": VERSION,
        "capabilities": [],
        "storage": None,
        "database_id": None,
        "epoch": None,
        "position": None,
        "read_only": False,
        "label": None,
        "session": None,
        "login": None,
        **fields,
    }


WELCOME: dict[str, Kind] = {
    "version": COUNT,
    "capabilities": list_of(TEXT),
    "session": optional(TOKEN),
    "database_id": optional(BYTES),
    "epoch": optional(COUNT),
    "last_tid": optional(TID),
    "changes": optional(list_of(CHANGE)),
    "size": optional(COUNT),
    "length": optional(COUNT),
    "name": optional(TEXT),
    "interfaces": list_of(TEXT),
    "supports_undo": BOOL,
    "read_only": BOOL,
    "roles": list_of(TEXT),
    "proof": optional(TEXT),
}

_R, _W, _P = AccessRole.READ, AccessRole.WRITE, AccessRole.PACK

# The arguments of a vote.
_VOTE = (
    ("transaction", TRANSACTION_ID),
    ("metadata", METADATA),
    ("operations", list_of(OPERATION)),
)

_TABLE = (
    Method("ping", (), None, needs_session=False),
    # It tells of everybody who is there.
    Method("status", (), AccessRole.ADMIN, needs_session=False),
    Method("load", (("oid", OID), ("before", TID)), _R),
    Method("load_many", (("oids", list_of(OID)), ("before", TID)), _R),
    Method(
        "load_ahead",
        (
            ("oids", list_of(OID)),
            ("before", TID),
            ("links", COUNT),
            ("bytes_max", COUNT),
        ),
        _R,
    ),
    Method("load_serial", (("oid", OID), ("tid", TID)), _R),
    Method(
        "load_blob",
        (("oid", OID), ("tid", TID), ("offset", COUNT), ("size", COUNT)),
        _R,
    ),
    Method("get_tid", (("oid", OID),), _R),
    Method("history", (("oid", OID), ("size", COUNT)), _R),
    Method("undo_log", (("before", optional(TID)), ("size", COUNT)), _R),
    Method(
        "transactions",
        (
            ("start", optional(TID)),
            ("stop", optional(TID)),
            ("cursor", optional(BYTES)),
        ),
        _R,
    ),
    Method("records", (("first", optional(OID)),), _R),
    Method("info", (), _R),
    Method("changes_since", (("position", TID),), _R),
    Method("last_known", (("tids", list_of(TID)),), _R),
    Method("verify", (("revisions", list_of(REVISION)),), _R),
    Method(
        "outcome",
        (
            ("transaction", TRANSACTION_ID),
            ("tid", optional(TID)),
            ("position", TID),
        ),
        _R,
    ),
    Method("new_oids", (("count", COUNT),), _W),
    Method(
        "stage",
        (("transaction", TRANSACTION_ID), ("operations", list_of(OPERATION))),
        _W,
        answers=False,
    ),
    Method(
        "blob_chunk",
        (("transaction", TRANSACTION_ID), ("number", COUNT), ("data", BYTES)),
        _W,
        answers=False,
    ),
    Method("vote", _VOTE, _W),
    Method("commit", (*_VOTE, ("position", TID)), _W),
    Method(
        "resolve",
        (("transaction", TRANSACTION_ID), ("resolutions", list_of(RESOLUTION))),
        _W,
    ),
    Method("finish", (("transaction", TRANSACTION_ID), ("position", TID)), _W),
    Method("abort", (("transaction", TRANSACTION_ID),), _W),
    Method("pack", (("time", TIME), ("gc", optional(BOOL))), _P),
    Method("pack_progress", (), _R),
    Method("pack_cancel", (), _P),
    Method(
        "changes", (("changes", list_of(CHANGE)),), _R, answers=False, sender="server"
    ),
)

METHODS = {method.name: method for method in _TABLE}

# What operations need beside the role of the method that brings them. Who restores may
# choose the tid of a transaction, and with it the tids of all that come after it.
OPERATION_ROLES: dict[str, AccessRole] = {
    "undo": AccessRole.UNDO,
    "delete": AccessRole.PACK,
    "restore": AccessRole.ADMIN,
    "restore_blob": AccessRole.ADMIN,
}
# Of the metadata of a vote: to keep the tid of a transaction that is copied.
TID_ROLE = AccessRole.ADMIN


def roles_of_call(name: str, args: list[Any]) -> Roles:
    """What the content of a checked call needs, beside the role of its method."""
    if name in ("vote", "commit"):
        metadata, operations = args[1:3]
    elif name == "stage":
        metadata, operations = None, args[1]
    else:
        return NO_ROLE
    # First the few kinds there are: a transaction may have very many operations.
    kinds = {operation[0] for operation in operations}
    needed = {OPERATION_ROLES[kind] for kind in kinds & OPERATION_ROLES.keys()}
    if metadata is not None and metadata[3] is not None:
        needed.add(TID_ROLE)
    return frozenset(needed)


def check_fields(what: str, fields: dict[str, Any], kinds: dict[str, Kind]) -> None:
    """Raise RemoteProtocolError unless ``fields`` has each of ``kinds``.

    Fields that are not in ``kinds`` are of a later version and ignored.
    """
    for name, kind in kinds.items():
        if name not in fields:
            raise RemoteProtocolError(f"a {what} without {name}")
        if not kind.accepts(fields[name]):
            raise RemoteProtocolError(f"a {what} whose {name} is not {kind.name}")
