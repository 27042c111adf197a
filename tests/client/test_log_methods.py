"""Undo and the log of a ClientStorage, in ZODB's spelling."""

from base64 import encodebytes
from collections.abc import Iterator

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import Unsupported
from ZODB.utils import p64
from ZopeUndo.Prefix import Prefix

from zeolith.client.storage import ClientStorage

from ..support.script import ScriptedServer, tid

A = p64(1)
T1, T2 = map(tid, range(1, 3))


@pytest.fixture
def storage(server: ScriptedServer) -> Iterator[ClientStorage]:
    storage = ClientStorage(server.address)
    yield storage
    storage.close()


def log_of(server: ScriptedServer) -> None:
    """Two transactions, of two users."""
    server.answers["undo_log"] = [
        [T2, b"/shop bob", b"second", b"", 20],
        [T1, b"/shop ann", b"first", b"", 10],
    ]


def test_the_undo_log_has_what_undo_needs(server, storage):
    log_of(server)
    entries = storage.undoLog()
    assert [entry["description"] for entry in entries] == [b"second", b"first"]
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    storage.undo(entries[0]["id"], meta)
    server.answers["vote"] = ["voted", None, [A]]
    assert storage.tpc_vote(meta) == [A]
    ((_number, _metadata, operations),) = server.asked("vote")
    assert operations == [["undo", T2]]


def test_the_undo_log_is_filtered_here(server, storage):
    log_of(server)
    found = storage.undoLog(0, -20, lambda entry: entry["user_name"] == b"/shop ann")
    assert [entry["description"] for entry in found] == [b"first"]


@pytest.mark.parametrize(
    ("specification", "found"),
    [
        (None, [b"second", b"first"]),
        ({}, [b"second", b"first"]),
        ({"user_name": b"/shop ann"}, [b"first"]),
        ({"user_name": "/shop ann"}, [b"first"]),
        ({"user_name": Prefix("/shop")}, [b"second", b"first"]),
        ({"user_name": Prefix("/other")}, []),
        ({"user_name": Prefix("/shop"), "description": b"second"}, [b"second"]),
        ({"no such key": 1}, []),
    ],
)
def test_undo_info_is_what_fits_a_specification(server, storage, specification, found):
    log_of(server)
    entries = storage.undoInfo(specification=specification)
    assert [entry["description"] for entry in entries] == found


def test_a_storage_that_cannot_undo_says_so(server):
    server.hello = {"supports_undo": False}
    storage = ClientStorage(server.address)
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    with pytest.raises(Unsupported, match="cannot undo"):
        storage.undo(encodebytes(T1).rstrip(), meta)
    storage.close()


def test_the_log_is_iterated_in_batches(server, storage):
    piece = [T1, " ", b"user", b"", b"", [[A, T1, b"data", None]]]
    server.answers["transactions"] = [[piece], None, None]
    (transaction,) = storage.iterator(T1, T2)
    assert [record.data for record in transaction] == [b"data"]
    assert server.asked("transactions") == [[T1, T2, None]]


def test_current_records_are_iterated_in_batches(server, storage):
    server.answers["records"] = [T2, [[A, T1, b"data"]], None]
    assert storage.record_iternext() == (A, T1, b"data", None)


def test_a_history_has_the_tid_of_each_revision(server, storage):
    server.answers["history"] = [[T2, b"user", b"second", b"", 20]]
    (entry,) = storage.history(A)
    assert (entry["tid"], entry["description"]) == (T2, b"second")
    assert server.asked("history") == [[A, 1]]
