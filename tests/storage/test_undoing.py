"""The conflicts of undos: who merges, and that a question has one answer."""

from typing import Any

import pytest
from ZODB.POSException import ConflictError, StorageTransactionError

from zeolith.storage.database import Conflict
from zeolith.storage.undoing import UndoConflicts
from zeolith.storage.wrapping import PLAIN, Form

from ..support.ids import number
from .transactions import A, B, length, plain, state_of


def conflict(oid: bytes = A, record: Any = plain, new: int = 1) -> Conflict:
    return Conflict(oid, number(3), number(2), record(3), record(2), record(new))


def test_what_the_server_knows_it_merges():
    undoing = UndoConflicts()
    assert state_of(undoing.merge(conflict(record=length))) == 2
    assert not undoing.unresolved


def test_what_it_does_not_know_is_asked():
    undoing = UndoConflicts()
    with pytest.raises(ConflictError) as raised:
        undoing.merge(conflict())
    assert raised.value.oid == A
    assert undoing.unresolved == [conflict()]


def test_an_answer_is_for_these_states_only():
    undoing = UndoConflicts()
    with pytest.raises(ConflictError):
        undoing.merge(conflict())
    undoing.answer({A: b"merged", B: b"nobody asked"})
    assert not undoing.unresolved
    assert undoing.merge(conflict()) == b"merged"
    for other in (conflict(new=0), conflict(B)):
        with pytest.raises(ConflictError):
            undoing.merge(other)
    assert list(undoing.asked()) == [A, B]


def test_of_an_object_one_conflict_is_asked_at_a_time():
    undoing = UndoConflicts()
    for new in (1, 0):
        with pytest.raises(ConflictError):
            undoing.merge(conflict(new=new))
    assert undoing.unresolved == [conflict(new=1)]


def behind(prefix: bytes) -> Form:
    """Records that begin with ``prefix``, against those that do not."""
    return Form(lambda r: r.removeprefix(prefix), lambda r: prefix + r)


@pytest.mark.parametrize("outside", [None, PLAIN, behind(b"file:")])
def test_what_is_in_the_file_in_another_form_is_merged_as_what_it_is(outside):
    in_file = behind(b"file:")
    asked = conflict(record=lambda n: in_file.encode(length(n)))
    merged = UndoConflicts().merge(asked, in_file, outside)
    assert state_of(in_file.decode(merged)) == 2


def test_the_client_is_asked_in_its_form_and_answers_in_it():
    in_file = behind(b"file:")
    asked = conflict(record=lambda n: in_file.encode(plain(n)))
    undoing = UndoConflicts()
    with pytest.raises(ConflictError):
        undoing.merge(asked, in_file, in_file)
    assert undoing.unresolved == [conflict()]
    undoing.answer({A: b"merged"})
    assert undoing.merge(asked, in_file, in_file) == b"file:merged"


def test_what_no_client_could_read_is_not_asked():
    undoing = UndoConflicts()
    with pytest.raises(ConflictError):
        undoing.merge(conflict(), outside=None)
    assert not undoing.unresolved
    undoing.answer({A: b"nobody asked"})


def test_an_empty_record_is_no_answer():
    undoing = UndoConflicts()
    with pytest.raises(ConflictError):
        undoing.merge(conflict())
    with pytest.raises(StorageTransactionError, match="is empty"):
        undoing.answer({A: b""})
