"""What a storage says it can do is what its server can, and it."""

from ZODB import interfaces

from zeolith.client.provided import provide


class Storage:
    """Can nothing by itself."""


NAMES = ["IStorageUndoable", "IBlobStorage", "ISomethingOfTomorrow"]


def test_what_the_server_names_is_provided_and_what_nobody_knows_is_not():
    storage = Storage()
    provide(storage, NAMES, has_blobs=False)
    assert interfaces.IStorageUndoable.providedBy(storage)
    assert not interfaces.IBlobStorage.providedBy(storage)
    assert not interfaces.IStorageIteration.providedBy(storage)
    assert not interfaces.IStorageUndoable.providedBy(Storage())


def test_with_a_place_for_blobs_it_is_a_blob_storage():
    storage = Storage()
    for _ in range(2):
        provide(storage, NAMES, has_blobs=True)
    assert interfaces.IBlobStorage.providedBy(storage)
