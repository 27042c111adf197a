"""What is iterated, copied and restored through a server is what was committed."""

from typing import Any, ClassVar

from ZODB.FileStorage import FileStorage
from ZODB.tests.IteratorStorage import ExtendedIteratorStorage, IteratorStorage
from ZODB.tests.RecoveryStorage import RecoveryStorage

from .served import ServedStorage

FILESTORAGE = """\
<filestorage {name}>
  path {name}.fs
</filestorage>
"""


class FileStorageIterationTests(
    ServedStorage, IteratorStorage, ExtendedIteratorStorage
):
    storage = FILESTORAGE


class DemoStorageIterationTests(
    ServedStorage, IteratorStorage, ExtendedIteratorStorage
):
    storage = f"<demostorage {{name}}>\n{FILESTORAGE}</demostorage>\n"

    # It has no undo.
    testUndoZombie = None


class MappingStorageIterationTests(
    ServedStorage, IteratorStorage, ExtendedIteratorStorage
):
    storage = "<mappingstorage {name}/>\n"

    # It has no undo.
    testUndoZombie = None


class RecoveryTests(ServedStorage, RecoveryStorage):
    """From one server's storage to another's."""

    storage = FILESTORAGE + FILESTORAGE.replace("{name}", "{name}-copy")
    copy: ClassVar[str] = "-copy"

    def setUp(self) -> None:
        super().setUp()
        self._dst = self.new_dest()

    def tearDown(self) -> None:
        self._dst.close()
        super().tearDown()

    def new_dest(self) -> Any:
        name, self.name = self.name, self.name + self.copy
        try:
            return self._client()
        finally:
            self.name = name


class RecoveryFromServerTests(RecoveryTests):
    """Out of a server, into a file."""

    storage = FILESTORAGE

    def new_dest(self) -> Any:
        return FileStorage("copy.fs")


class RecoveryToServerTests(RecoveryTests):
    """Out of a file, into a server."""

    storage = FILESTORAGE

    def setUp(self) -> None:
        super().setUp()
        self._dst, self._storage = self._storage, self._dst

    def new_dest(self) -> Any:
        if hasattr(self, "_dst"):
            return self._client()
        return FileStorage("source.fs")


del ServedStorage
