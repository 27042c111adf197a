"""A wrapper above a ClientStorage, before and after it has somebody to tell."""

from typing import Any

from zc.zlibstorage import ZlibStorage
from ZODB.MappingStorage import MappingStorage

from zeolith.client.wrapped import WrapperListener, is_wrapper

from ..support.records import Listening

TID = b"12345678"


def test_a_wrapper_is_told_from_a_database():
    assert is_wrapper(ZlibStorage(MappingStorage()))
    assert not is_wrapper(Listening())


def test_a_wrapper_that_nobody_registered_with_has_nobody_to_tell():
    listener = WrapperListener(ZlibStorage(MappingStorage()))
    listener.invalidate(TID, [])
    listener.invalidateCache()


def test_a_wrapper_tells_its_database():
    wrapper = ZlibStorage(MappingStorage())
    database = Listening()
    wrapper.registerDB(database)
    listener = WrapperListener(wrapper)
    listener.invalidate(TID, [b"oid"])
    listener.invalidateCache()
    assert (database.told, database.afresh) == ([(TID, {b"oid"})], 1)


def test_a_stack_of_wrappers_leads_to_the_database_or_nowhere():
    inner = ZlibStorage(MappingStorage())
    outer = ZlibStorage(inner)
    listener = WrapperListener(inner)
    listener.invalidate(TID, [])
    database: Any = Listening()
    outer.registerDB(database)
    listener.invalidate(TID, [])
    assert database.tids == [TID]
