"""Random histories of a Data.fs, written by ZODB's own FileStorage.

A history is a list of steps, each of them one transaction: some stores, an undo of
an earlier transaction, or the removal of an object. Steps that ZODB refuses (there is
nothing to undo, the object is gone) are aborted and leave no trace.
"""

import pickle
from base64 import encodebytes
from typing import Any

from hypothesis import strategies as st
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError, UndoError
from ZODB.utils import newTid, z64

from ..support.ids import number

# The first bytes of a record that are read at once; sizes around it are the
# interesting ones.
READ_BYTES = 4096
OIDS = [number(value) for value in (1, 2, 3, 255, 65536)]
MISSING = number(4)

_sizes = (
    st.integers(1, 200)
    | st.integers(READ_BYTES - 60, READ_BYTES + 20)
    | st.integers(READ_BYTES * 2 - 60, READ_BYTES * 2 + 20)
    | st.just(70_000)
)
_texts = st.binary(max_size=30) | st.just(b"x" * 600)
_stores = st.dictionaries(st.sampled_from(OIDS), _sizes, min_size=1, max_size=3)
_metadata = st.fixed_dictionaries({"user": _texts, "description": _texts})
steps = st.tuples(
    st.tuples(st.just("store"), _stores)
    | st.tuples(st.just("undo"), st.integers(1, 5))
    | st.tuples(st.just("delete"), st.sampled_from(OIDS)),
    _metadata,
)
histories = st.lists(steps, max_size=14)


def write(storage: Any, history: list[Any]) -> list[bytes]:
    """The tids of those steps that were committed."""
    tids: list[bytes] = []
    for (name, argument), metadata in history:
        transaction = TransactionMetaData(**metadata, extension=b"")
        transaction.extension_bytes = pickle.dumps({"step": len(tids)}, 3)
        storage.tpc_begin(transaction, newTid(tids[-1] if tids else None))
        try:
            if name == "store":
                _store(storage, argument, len(tids), transaction)
            elif name == "undo":
                _undo(storage, tids, argument, transaction)
            else:
                storage.deleteObject(argument, storage.getTid(argument), transaction)
        except (UndoError, POSKeyError):
            storage.tpc_abort(transaction)
            continue
        storage.tpc_vote(transaction)
        tids.append(storage.tpc_finish(transaction))
    return tids


def _store(storage: Any, stores: Any, step: int, transaction: Any) -> None:
    for oid, size in stores.items():
        try:
            serial = storage.getTid(oid)
        except POSKeyError:
            # Never stored, or removed: then it is the tid of the removal.
            position = storage._index.get(oid)
            serial = storage._read_data_header(position).tid if position else z64
        mark = b"%d of %d " % (step, int.from_bytes(oid, "big"))
        data = (mark * (size // len(mark) + 1))[:size]
        storage.store(oid, serial, data, "", transaction)


def _undo(storage: Any, tids: list[bytes], back: int, transaction: Any) -> None:
    if back > len(tids):
        raise UndoError("there is nothing to undo")
    storage.undo(encodebytes(tids[-back]).rstrip(), transaction)


def outcome(function: Any, *args: Any) -> Any:
    """What a call returns, or the class of what it raises."""
    try:
        result = function(*args)
    except KeyError as error:
        return type(error)
    return tuple(result) if isinstance(result, tuple) else result


def moments(tids: list[bytes]) -> list[bytes]:
    """Snapshots before, at and after each transaction."""
    values = {0, 1, 2**63 - 1}
    for tid in tids:
        at = int.from_bytes(tid, "big")
        values |= {at - 1, at, at + 1}
    return [number(value) for value in sorted(values)]


def opened(path: Any) -> FileStorage:
    """A new Data.fs at `path`."""
    return FileStorage(str(path), create=True)
