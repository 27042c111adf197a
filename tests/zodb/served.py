"""What ZODB's storage tests need to run against a server: a fresh storage a test.

One server process serves all tests of a class. It has as many storages as the class
has tests, and every test takes one that nobody has used.
"""

import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ZODB.tests.BasicStorage import BasicStorage
from ZODB.tests.ConflictResolution import ConflictResolvingStorage
from ZODB.tests.HistoryStorage import HistoryStorage
from ZODB.tests.MTStorage import MTStorage
from ZODB.tests.PersistentStorage import PersistentStorage
from ZODB.tests.ReadOnlyStorage import ReadOnlyStorage
from ZODB.tests.RevisionStorage import RevisionStorage
from ZODB.tests.StorageTestBase import StorageTestBase
from ZODB.tests.Synchronization import SynchronizedStorage

from zeolith.client.storage import ClientStorage

from ..support.serving import ServerProcess


class Database:
    """A ZODB database that a storage can tell of changes, and that forgets them."""

    def invalidate(self, tid: bytes, oids: Any) -> None:
        pass

    def invalidateCache(self) -> None:
        pass

    def transform_record_data(self, data: bytes) -> bytes:
        return data

    untransform_record_data = transform_record_data


class ServedStorage(StorageTestBase):
    """A test of a storage that a server process has; subclasses say which."""

    # ZODB's iterator tests look at it: extensions are bytes to a modern storage.
    use_extension_bytes = True
    # A section of a configuration file, with {name} where the name belongs.
    storage: ClassVar[str]
    # Lines of the section <zeolith>, and what a client needs then.
    options: ClassVar[str] = ""
    client_options: ClassVar[dict[str, Any]] = {}
    server: ClassVar[ServerProcess]
    unused: ClassVar[Iterator[str]]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        tests = unittest.defaultTestLoader.getTestCaseNames(cls)
        names = [f"s{number}" for number in range(len(tests))]
        cls.unused = iter(names)
        sections = "".join(cls.storage.format(name=name) for name in names)
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        folder = Path(directory.name)
        cls.prepare(folder)
        cls.server = ServerProcess(folder, storages=sections, options=cls.options)
        cls.server.start()
        cls.addClassCleanup(stop_without_complaints, cls.server)

    @classmethod
    def prepare(cls, folder: Path) -> None:
        """Put into the server's folder what its options name."""

    def setUp(self) -> None:
        super().setUp()
        self.name = next(self.unused)
        self.open()

    def open(self, read_only: bool = False) -> None:
        self._storage = self._client(read_only=read_only)

    def _new_storage_client(self) -> ClientStorage:
        return self._client()

    def _client(self, **options: Any) -> ClientStorage:
        options = {**self.client_options, **options}
        client = ClientStorage(self.server.address, storage=self.name, **options)
        client.registerDB(Database())
        return client


class EveryStorage(
    ServedStorage,
    BasicStorage,
    ConflictResolvingStorage,
    HistoryStorage,
    MTStorage,
    PersistentStorage,
    ReadOnlyStorage,
    RevisionStorage,
    SynchronizedStorage,
):
    """What ZODB asks of every storage, undo apart."""

    def testResolve(self) -> None:
        # ZODB's own method has lost the prefix that would make it a test.
        self.checkResolve()

    @pytest.mark.slow
    def test_race_external_invalidate_vs_disconnect(self) -> None:
        # Ten seconds of work between clients: a FileStorage has it every day.
        super().test_race_external_invalidate_vs_disconnect()


def stop_without_complaints(server: ServerProcess) -> None:
    """Stop it; nothing may have gone wrong in it that no client was told."""
    server.terminate()
    text = server.stderr_text()
    assert "Traceback" not in text, text
    assert "Warning" not in text, text
