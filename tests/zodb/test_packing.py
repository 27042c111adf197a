"""ZODB's tests of packing, against storages that a server process has."""

from ZODB.tests.PackableStorage import (
    PackableStorage,
    PackableStorageWithOptionalGC,
    PackableUndoStorage,
)

from .served import ServedStorage


class TestFileStorage(
    ServedStorage, PackableUndoStorage, PackableStorageWithOptionalGC
):
    """A Data.fs: packed by a process of its own."""

    storage = "<filestorage {name}>\n  path {name}.fs\n</filestorage>\n"

    def testPackUndoLog(self) -> None:
        # As it is meant: ZODB patches the clock of this process, not the server's.
        PackableUndoStorage.testPackUndoLog.__wrapped__(self)


class TestMappingStorage(ServedStorage, PackableStorage):
    """In the server's memory, packed by a thread of it."""

    storage = "<mappingstorage {name}>\n</mappingstorage>\n"


class TestDemoStorage(ServedStorage, PackableStorage):
    """Changes over an empty base; garbage is not collected there."""

    storage = "<demostorage {name}>\n</demostorage>\n"
