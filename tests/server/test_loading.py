"""What a load is answered of an object that is younger, deleted, or not announced."""

import pytest
from ZODB.POSException import POSKeyError

from zeolith.server.loading import answer_of, load_announced, load_several
from zeolith.storage.database import Revision

from ..support.ids import number

OID = number(7)


class Object:
    """One object's revisions by tid; one without data deletes it."""

    def __init__(self, revisions: dict[bytes, bytes | None]):
        self._revisions = revisions

    def __call__(self, oid: bytes, before: bytes) -> Revision | None:
        assert oid == OID
        if not self._revisions:
            raise POSKeyError(oid)
        end = None
        for tid, data in sorted(self._revisions.items(), reverse=True):
            if tid < before:
                if data is None:
                    raise POSKeyError(oid)
                return Revision(data, tid, end)
            end = tid
        return None


def test_what_is_there_is_loaded():
    load = Object({number(1): b"one", number(3): b"three"})
    found = load_announced(load, OID, number(3), number(4))
    assert found == Revision(b"one", number(1), number(3))
    assert answer_of(number(3), found) == (b"one", number(1), number(3), number(3))


def test_an_object_that_is_younger_is_nothing():
    found = load_announced(Object({number(3): b"three"}), OID, number(2), number(4))
    assert found is None
    assert answer_of(number(3), found) == (None, None, None, number(3))


def test_an_object_that_is_younger_and_was_deleted_is_nothing():
    load = Object({number(3): b"three", number(4): None})
    assert load_announced(load, OID, number(2), number(5)) is None


@pytest.mark.parametrize("before", [number(1), number(3)])
def test_an_object_that_was_not_announced_is_not_there(before):
    load = Object({number(3): b"three", number(4): b"four"})
    with pytest.raises(POSKeyError):
        load_announced(load, OID, before, number(3))


def test_an_object_that_is_not_there_is_not_there():
    with pytest.raises(POSKeyError):
        load_announced(Object({}), OID, number(2), number(4))
    assert load_several(Object({}), [OID, OID], number(2), 1000) == [None, None]
