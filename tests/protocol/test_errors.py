"""Which exceptions cross the wire, and what is left of them."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transaction.interfaces import TransientError
from ZODB import POSException
from ZODB.FileStorage.FileStorage import FileStorageError, FileStorageQuotaError
from ZODB.POSException import (
    BTreesConflictError,
    ConflictError,
    MultipleUndoErrors,
    POSKeyError,
    ReadConflictError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
    UndoError,
)

from zeolith.protocol.codec import decode, encode
from zeolith.protocol.errors import (
    CROSSING_NAMES,
    Forbidden,
    HelloRefused,
    LocalProtocolError,
    Overloaded,
    RemoteFailure,
    RemoteProtocolError,
    ShuttingDown,
    TransactionTimeout,
    Unavailable,
    WriteForbidden,
    ZeolithError,
    error_of,
    failure_of,
)
from zeolith.protocol.frames import PREFIX_BYTES
from zeolith.protocol.messages import Failure

from .strategies import fields, plain, texts

OID, TID, OTHER_TID = b"oid45678", b"tid45678", b"tid45679"
BY_TEXT_ALONE = [
    POSException.POSError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
    POSException.StorageSystemError,
    POSException.Unsupported,
    FileStorageError,
    FileStorageQuotaError,
    Forbidden,
    WriteForbidden,
    TransactionTimeout,
    Overloaded,
    ShuttingDown,
    Unavailable,
    LocalProtocolError,
    RemoteProtocolError,
    KeyError,
    ValueError,
    TypeError,
]


class Account:
    """What a ConflictError can name as its object's class."""

    _p_oid = OID
    _p_serial = TID


def crossed(error: BaseException) -> Any:
    """`error` as the other end gets it, through real bytes."""
    message = decode(encode(Failure(1, *failure_of(error)))[PREFIX_BYTES:])
    assert isinstance(message, Failure)
    return error_of(message.name, message.attributes, message.text)


def test_everything_that_crosses_is_tested_here():
    tested = {each.__name__ for each in BY_TEXT_ALONE} | {
        "POSKeyError",
        "ConflictError",
        "ReadConflictError",
        "UndoError",
        "MultipleUndoErrors",
        "HelloRefused",
    }
    assert set(CROSSING_NAMES) == tested


@pytest.mark.parametrize("kind", BY_TEXT_ALONE)
def test_an_error_arrives_with_its_class_and_its_text(kind):
    received = crossed(kind("no more"))
    assert type(received) is kind
    assert received.args == ("no more",)


def test_a_key_error_arrives_with_its_oid():
    received = crossed(POSKeyError(OID))
    assert type(received) is POSKeyError
    assert received.args == (OID,)
    assert str(received) == str(POSKeyError(OID))


@pytest.mark.parametrize("args", [("text",), (1, 2)])
def test_a_key_error_without_an_oid_arrives_too(args):
    received = crossed(POSKeyError(*args))
    assert type(received) is POSKeyError


@pytest.mark.parametrize("kind", [ConflictError, ReadConflictError])
def test_a_conflict_arrives_with_everything_that_can_be_asked_of_it(kind):
    sent = kind(object=Account(), serials=(TID, OTHER_TID))
    received = crossed(sent)
    assert type(received) is kind
    for attribute in ("oid", "serials", "class_name", "message"):
        assert getattr(received, attribute) == getattr(sent, attribute), attribute
    assert received.oid == OID
    assert received.get_class_name() == sent.get_class_name()
    assert received.get_new_serial() == TID
    assert received.get_old_serial() == OTHER_TID
    assert str(received) == str(sent)


def test_a_conflict_of_which_nothing_is_known_arrives():
    received = crossed(ConflictError())
    assert type(received) is ConflictError
    assert (received.oid, received.serials, received.class_name) == (None, None, None)
    assert received.message == ConflictError().message


def test_a_conflict_may_be_tried_again():
    assert isinstance(crossed(ConflictError(oid=OID)), TransientError)
    assert isinstance(crossed(TransactionTimeout("30 s")), TransientError)
    assert isinstance(crossed(ShuttingDown("soon")), TransientError)
    assert isinstance(crossed(Overloaded("later")), TransientError)


class _Away(StorageError, TransientError):
    """An error of a storage that is no class of ours."""


def test_what_may_be_tried_again_stays_so_whatever_its_class():
    received = crossed(_Away("no server"))
    assert type(received) is Unavailable
    assert isinstance(received, TransientError)
    assert received.args == ("no server",)


def test_an_undo_error_arrives_with_reason_and_oid():
    received = crossed(UndoError("modified later", OID))
    assert type(received) is UndoError
    assert received._reason == "modified later"
    assert received._oid == OID
    assert str(received) == str(UndoError("modified later", OID))


def test_an_undo_error_without_oid_arrives():
    received = crossed(UndoError("non-undoable transaction"))
    assert str(received) == str(UndoError("non-undoable transaction"))


def test_many_undo_errors_arrive_in_their_order():
    received = crossed(MultipleUndoErrors([("modified", OID), ("gone", TID)]))
    assert type(received) is MultipleUndoErrors
    assert received._errs == [("modified", OID), ("gone", TID)]


def test_undo_errors_arrive_as_a_file_storage_raises_them():
    """FileStorage gives pairs of an oid and an exception."""
    sent = MultipleUndoErrors([(OID, UndoError("modified", OID))])
    received = crossed(sent)
    assert type(received) is MultipleUndoErrors
    assert received._errs == [(OID, str(UndoError("modified", OID)))]


def test_many_undo_errors_of_which_there_are_none_are_one():
    received = error_of("MultipleUndoErrors", {"errors": []}, "it failed")
    assert type(received) is UndoError


@pytest.mark.parametrize("reason", HelloRefused.REFUSALS)
def test_a_refusal_arrives_with_its_reason(reason):
    received = crossed(HelloRefused(reason, "there is no storage 'x'"))
    assert type(received) is HelloRefused
    assert received.reason == reason
    assert str(received) == "there is no storage 'x'"


@pytest.mark.parametrize(
    ("sent", "arrives_as"),
    [
        (BTreesConflictError(1, 2, 3, 4), ConflictError),
        (POSException.DanglingReferenceError(OID, TID), POSException.POSError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), ValueError),
    ],
)
def test_a_subclass_arrives_as_the_nearest_class_that_crosses(sent, arrives_as):
    assert type(crossed(sent)) is arrives_as


@pytest.mark.parametrize(
    "sent", [OSError(28, "No space left on device"), MemoryError(), KeyboardInterrupt()]
)
def test_an_error_of_no_class_here_is_a_remote_failure_with_name_and_text(sent):
    received = crossed(sent)
    assert type(received) is RemoteFailure
    assert received.name == type(sent).__name__
    assert received.text == str(sent)
    assert isinstance(received, StorageError)
    assert isinstance(received, ZeolithError)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "SystemExit",
        "builtins.ValueError",
        "ZODB.POSException.ConflictError",
        "BTreesConflictError",
        "tests.protocol.test_errors.Account",
        "a_module_that_is_not_there",
        "",
    ],
)
def test_a_name_that_is_not_on_the_list_is_never_imported(name, monkeypatch):
    imported = []
    with monkeypatch.context() as patched:
        patched.setattr("builtins.__import__", lambda *args: imported.append(args))
        received = error_of(name, {"oid": OID}, "text")
    assert not imported
    assert type(received) is RemoteFailure
    assert (received.name, received.text) == (name, "text")


WRONG_ATTRIBUTES = [
    ("POSKeyError", {"oid": "text"}),
    ("ConflictError", {"oid": 1}),
    ("ConflictError", {"message": b"bytes"}),
    ("ConflictError", {"class_name": []}),
    ("ConflictError", {"serials": TID}),
    ("ConflictError", {"serials": [TID]}),
    ("ConflictError", {"serials": [TID, OTHER_TID, TID]}),
    ("ReadConflictError", {"serials": [TID, "text"]}),
    ("ReadConflictError", {"serials": {TID: OTHER_TID}}),
    ("UndoError", {"reason": 1}),
    ("UndoError", {"reason": "text", "oid": "text"}),
    ("MultipleUndoErrors", {"errors": [1]}),
    ("MultipleUndoErrors", {"errors": [["reason"]]}),
    ("MultipleUndoErrors", {"errors": [["reason", OID, OID]]}),
    ("MultipleUndoErrors", {"errors": [[None, OID]]}),
    ("HelloRefused", {"reason": b"version"}),
]


@pytest.mark.parametrize(("name", "attributes"), WRONG_ATTRIBUTES)
def test_attributes_of_other_classes_are_refused(name, attributes):
    with pytest.raises(RemoteProtocolError):
        error_of(name, attributes, "text")


@given(st.sampled_from(CROSSING_NAMES) | texts, fields, texts)
@example("ConflictError", {"serials": [b"1", b"2"]}, "")
def test_whatever_arrives_is_an_error_that_can_be_printed(name, attributes, text):
    try:
        received = error_of(name, attributes, text)
    except RemoteProtocolError:
        return
    assert isinstance(received, Exception)
    assert isinstance(str(received), str)


@given(
    st.sampled_from(CROSSING_NAMES),
    st.sampled_from(["oid", "serials", "class_name", "message", "reason", "errors"]),
    plain,
)
def test_whatever_an_attribute_is_it_makes_no_other_error(name, attribute, value):
    try:
        received = error_of(name, {attribute: value}, "text")
    except RemoteProtocolError:
        return
    assert isinstance(str(received), str)


def test_text_that_is_no_unicode_arrives_escaped():
    """The name of a file need not be UTF-8."""
    received = crossed(FileStorageError("/srv/\udcff.fs"))
    assert str(received) == "/srv/\\udcff.fs"


def test_there_is_one_root_for_what_zeolith_complains_about():
    for each in (
        LocalProtocolError,
        RemoteProtocolError,
        RemoteFailure,
        HelloRefused,
    ):
        assert issubclass(each, ZeolithError)
