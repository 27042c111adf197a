"""The errors of the protocol, and the exceptions that may cross the wire.

::

    ZeolithError
      ProtocolError              never raised itself; blame is in the class
        LocalProtocolError         this end tried what the state forbids
        RemoteProtocolError        the other end sent garbage, or too much, or too early
      RemoteFailure              a method failed at the other end with an error that has
                                 no class here: its name and text are all there is
      HelloRefused               the server will not have this client: .reason says why
      Forbidden                  the server's rules do not let this client do it
        WriteForbidden             nor anything that changes the database

An exception crosses the wire as ``(name, attributes, text)``. Only the names in
``_CROSSING`` become exceptions of a class again, and each is rebuilt by code here,
from attributes whose types are checked: nothing is ever imported, and no constructor
chosen, by a name that came from a peer. Pure functions; any thread.
"""

from collections.abc import Callable
from typing import Any

from transaction.interfaces import TransientError
from ZODB import POSException
from ZODB.FileStorage.FileStorage import FileStorageError, FileStorageQuotaError


class ZeolithError(Exception):
    """Whatever zeolith itself has to complain about."""


class ProtocolError(ZeolithError):
    """The rules of the wire were broken; see the two subclasses for by whom."""


class LocalProtocolError(ProtocolError):
    """This end tried to send what the state of the connection forbids."""


class RemoteProtocolError(ProtocolError):
    """The other end broke the rules; the connection is of no more use."""


class RemoteFailure(ZeolithError, POSException.StorageError):
    """A method failed at the other end with an error that has no class here."""

    def __init__(self, name: str, text: str):
        super().__init__(f"{name}: {text}" if text else name)
        self.name = name
        self.text = text


class HelloRefused(ZeolithError):
    """The server refuses this client, and will do so again if nothing changes.

    ``reason`` is one of REFUSALS, the argument a sentence for a person.
    """

    REFUSALS = (
        "version",
        "storage",
        "read-only",
        "session",
        "stopping",
        "access",
        "limit",
        "tls",
        "login",
    )

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


class Forbidden(ZeolithError, POSException.StorageError):
    """This client has not the role that it takes; see docs/operations.md.

    Nothing was done. The text says which role is missing.
    """


class WriteForbidden(Forbidden, POSException.ReadOnlyError):
    """This client may only read; to ZODB it is a ReadOnlyError."""


class TransactionTimeout(POSException.StorageTransactionError, TransientError):
    """The server aborted a voted transaction that took too long to finish.

    Nothing of it was committed, so it may be tried again.
    """


class ShuttingDown(POSException.StorageError, TransientError):
    """The server is stopping and takes no new transaction; nothing was committed."""


class Overloaded(POSException.StorageError, TransientError):
    """The server has no room for this transaction now; nothing was committed."""


class Unavailable(POSException.StorageError, TransientError):
    """What the server's storage stands on, another server, cannot be reached.

    Nothing was committed, so it may be tried again.
    """


Attributes = dict[str, Any]
_Outbound = Callable[[Any], Attributes]
_Inbound = Callable[[Attributes, str], Exception]


def _nothing(_error: Exception) -> Attributes:
    return {}


def _oid_of(error: Exception) -> Attributes:
    oid = error.args[0] if error.args else None
    return {"oid": oid if isinstance(oid, bytes) else None}


def _conflict_attributes(error: POSException.ConflictError) -> Attributes:
    if isinstance(error, POSException.BTreesConflictError):
        # It has nothing of what its base class has.
        return {"message": str(error)}
    return {
        "oid": error.oid,
        "serials": _pair_of_bytes(error.serials),
        "class_name": error.class_name,
        "message": error.message,
    }


def _pair_of_bytes(serials: Any) -> list[bytes] | None:
    pair = list(serials or ())
    are_bytes = len(pair) == 2 and all(isinstance(each, bytes) for each in pair)
    return pair if are_bytes else None


def _conflict(
    build: Callable[..., POSException.ConflictError],
) -> _Inbound:
    def inbound(attributes: Attributes, _text: str) -> Exception:
        error = build(
            message=_text_or_none(attributes, "message"),
            oid=_bytes_or_none(attributes, "oid"),
            serials=_serials_or_none(attributes),
        )
        error.class_name = _text_or_none(attributes, "class_name")
        return error

    return inbound


def _undo_attributes(error: POSException.UndoError) -> Attributes:
    oid = error._oid if isinstance(error._oid, bytes) else None
    return {"reason": str(error._reason), "oid": oid}


def _undo(attributes: Attributes, _text: str) -> Exception:
    return POSException.UndoError(
        _text_or_none(attributes, "reason"), _bytes_or_none(attributes, "oid")
    )


def _undo_errors_attributes(error: POSException.MultipleUndoErrors) -> Attributes:
    # ZODB's own FileStorage gives (oid, reason) pairs where the class wants
    # (reason, oid); the order is kept, only the reasons become text.
    return {
        "errors": [
            [part if isinstance(part, bytes) else str(part) for part in pair]
            for pair in error._errs
        ]
    }


def _undo_errors(attributes: Attributes, text: str) -> Exception:
    pairs = attributes.get("errors")
    if not isinstance(pairs, list) or not pairs:
        return POSException.UndoError(text)
    for pair in pairs:
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(part, bytes | str) for part in pair)
        ):
            raise RemoteProtocolError("a failure's errors are not pairs")
    return POSException.MultipleUndoErrors([(pair[0], pair[1]) for pair in pairs])


def _with_text(build: Callable[[str], Exception]) -> _Inbound:
    return lambda _attributes, text: build(text)


def _with_oid(build: Callable[[Any], Exception]) -> _Inbound:
    def inbound(attributes: Attributes, text: str) -> Exception:
        oid = _bytes_or_none(attributes, "oid")
        return build(text if oid is None else oid)

    return inbound


_CROSSING: dict[type[Exception], tuple[str, _Outbound, _Inbound]] = {
    POSException.POSKeyError: (
        "POSKeyError",
        _oid_of,
        _with_oid(POSException.POSKeyError),
    ),
    KeyError: ("KeyError", _nothing, _with_text(KeyError)),
    POSException.ConflictError: (
        "ConflictError",
        _conflict_attributes,
        _conflict(POSException.ConflictError),
    ),
    POSException.ReadConflictError: (
        "ReadConflictError",
        _conflict_attributes,
        _conflict(POSException.ReadConflictError),
    ),
    POSException.UndoError: ("UndoError", _undo_attributes, _undo),
    POSException.MultipleUndoErrors: (
        "MultipleUndoErrors",
        _undo_errors_attributes,
        _undo_errors,
    ),
    HelloRefused: (
        "HelloRefused",
        lambda error: {"reason": error.reason},
        lambda attributes, text: HelloRefused(
            _text_or_none(attributes, "reason") or "session", text
        ),
    ),
    ValueError: ("ValueError", _nothing, _with_text(ValueError)),
    TypeError: ("TypeError", _nothing, _with_text(TypeError)),
}
_BY_TEXT_ALONE: tuple[type[Exception], ...] = (
    POSException.POSError,
    POSException.ReadOnlyError,
    POSException.StorageError,
    POSException.StorageTransactionError,
    POSException.StorageSystemError,
    POSException.Unsupported,
    FileStorageError,
    FileStorageQuotaError,
    Forbidden,
    WriteForbidden,
    TransactionTimeout,
    ShuttingDown,
    Overloaded,
    Unavailable,
    LocalProtocolError,
    RemoteProtocolError,
)
_CROSSING.update(
    {each: (each.__name__, _nothing, _with_text(each)) for each in _BY_TEXT_ALONE}
)
_INBOUND = {name: inbound for name, _outbound, inbound in _CROSSING.values()}

CROSSING_NAMES = tuple(sorted(_INBOUND))


def failure_of(error: BaseException) -> tuple[str, Attributes, str]:
    """``(name, attributes, text)`` that tells ``error`` to the other end.

    The name is that of the nearest base class that may cross (one that may be tried
    again stays such a one, as Unavailable if need be); an error of which no
    base may cross keeps its own class's name and arrives as RemoteFailure. Its text
    goes along, its attributes and traceback do not.
    """
    for each in type(error).__mro__:
        if each in _CROSSING:
            if isinstance(error, TransientError) and not issubclass(
                each, TransientError
            ):
                # Whatever it is to those who know its class, to try again may help.
                each = Unavailable
            name, outbound, _inbound = _CROSSING[each]
            attributes = outbound(error)
            return name, {k: _sendable(v) for k, v in attributes.items()}, _text(error)
    return type(error).__name__, {}, _text(error)


def error_of(name: str, attributes: Attributes, text: str) -> Exception:
    """The exception that the other end told with ``failure_of``; see RemoteFailure.

    Raises RemoteProtocolError when the attributes are not of their types.
    """
    inbound = _INBOUND.get(name)
    if inbound is None:
        return RemoteFailure(name, text)
    return inbound(attributes, text)


def _text(error: BaseException) -> str:
    text = str(error)
    if len(error.args) == 1 and isinstance(error.args[0], str):
        text = error.args[0]
    return _encodable(text)


def _encodable(text: str) -> str:
    # The name of a file may be in it that is not UTF-8.
    return text.encode(errors="backslashreplace").decode()


def _sendable(value: Any) -> Any:
    """``value``, or what can be sent of it: storages put anything into their errors.

    An error that could not be sent would leave whoever waits for it waiting.
    """
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, list):
        return [_sendable(each) for each in value]
    return value if isinstance(value, bytes) else None


def _bytes_or_none(attributes: Attributes, key: str) -> bytes | None:
    value = attributes.get(key)
    if value is None or isinstance(value, bytes):
        return value
    raise RemoteProtocolError(f"a failure's {key} is not bytes")


def _text_or_none(attributes: Attributes, key: str) -> str | None:
    value = attributes.get(key)
    if value is None or isinstance(value, str):
        return value
    raise RemoteProtocolError(f"a failure's {key} is not text")


def _serials_or_none(attributes: Attributes) -> tuple[bytes, bytes] | None:
    serials = attributes.get("serials")
    if not serials:
        return None
    if (
        isinstance(serials, list)
        and len(serials) == 2
        and all(isinstance(each, bytes) for each in serials)
    ):
        return serials[0], serials[1]
    raise RemoteProtocolError("a failure's serials are not two of bytes")
