"""What a storage tells, on its way to a listener."""

from ZODB.interfaces import IStorageWrapper
from zope.interface.verify import verifyObject

from zeolith.storage.feed import Feed, Told
from zeolith.storage.tids import following

from .transactions import ROOT, A, B, plain

T1 = following(bytes(8))
T2 = following(T1)
ID = b"t" * 16


def test_what_was_told_before_anybody_listened_comes_first():
    feed, told = Feed(), list[Told | None]()
    feed.invalidate(T1, [A, B])
    feed.invalidateCache()
    feed.follow(told.append)
    feed.own(T2, [A], ID)
    assert told == [Told(T1, [A, B], None), None, Told(T2, [A], ID)]


def test_the_oids_are_kept_as_they_were_told():
    feed, told = Feed(), list[Told | None]()
    feed.follow(told.append)
    oids = {A}
    # As wrappers of old call it.
    feed.invalidate(T1, oids, "")
    oids.clear()
    assert told == [Told(T1, [A], None)]


def test_it_is_what_a_storage_wants_to_have_registered():
    assert verifyObject(IStorageWrapper, Feed())


def test_records_leave_as_they_are():
    feed = Feed()
    assert feed.transform_record_data(b"record") == b"record"
    assert feed.untransform_record_data(b"record") == b"record"


def test_references_are_found_without_importing_anything():
    oids: list[bytes] = []
    Feed().references(plain(1), oids)
    assert oids == []
    assert ROOT not in oids
