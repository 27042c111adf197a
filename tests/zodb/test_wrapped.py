"""Storages that change records on their way, at either end of the wire."""

from typing import Any

import pytest
from ZODB.tests import hexstorage
from ZODB.tests.ConflictResolution import ConflictResolvingTransUndoStorage
from ZODB.tests.IteratorStorage import ExtendedIteratorStorage, IteratorStorage
from ZODB.tests.PackableStorage import (
    PackableStorageWithOptionalGC,
    PackableUndoStorage,
)
from ZODB.tests.TransactionalUndoStorage import TransactionalUndoStorage

from .served import EveryStorage, ServedStorage


class HexStorage(hexstorage.HexStorage):
    """ZODB's own tells its database of a version, which no database takes any more."""

    def invalidate(self, transaction_id: bytes, oids: Any, _version: str = "") -> None:
        self.db.invalidate(transaction_id, oids)

    def iterator(self, *bounds: bytes | None) -> Any:
        # Not a generator: whoever asks must hear at once that there is none.
        return iter([*super().iterator(*bounds)])


class LogStorage(
    ServedStorage,
    TransactionalUndoStorage,
    ConflictResolvingTransUndoStorage,
    PackableStorageWithOptionalGC,
    PackableUndoStorage,
    IteratorStorage,
    ExtendedIteratorStorage,
):
    """What ZODB asks of storages that have a log: undo, packing and iteration."""

    # ZODB sets this process's clock for it; the one that counts is the server's.
    testPackUndoLog = PackableUndoStorage.testPackUndoLog.__wrapped__


class ServerHexTests(EveryStorage):
    """What comes to the server is plain, what is in the file is not."""

    storage = """\
%import ZODB.tests
<hexstorage {name}>
  <filestorage>
    path {name}.fs
  </filestorage>
</hexstorage>
"""


class ClientHexTests(EveryStorage):
    """What comes to the server is in hexadecimal, and it can look into it."""

    storage = """\
%import ZODB.tests
<serverhexstorage {name}>
  <filestorage>
    path {name}.fs
  </filestorage>
</serverhexstorage>
"""

    def _client(self, **options: Any) -> Any:
        return HexStorage(super()._client(**options))


class ServerHexLogTests(LogStorage):
    storage = ServerHexTests.storage


class ClientHexLogTests(LogStorage):
    storage = ClientHexTests.storage

    def _client(self, **options: Any) -> Any:
        return HexStorage(super()._client(**options))


@pytest.mark.slow
class ClientHexAloneTests(ClientHexTests):
    """The server knows nothing of it, and leaves all conflicts to the client."""

    storage = """\
<filestorage {name}>
  path {name}.fs
</filestorage>
"""


@pytest.mark.slow
class ZlibTests(EveryStorage):
    storage = """\
%import zc.zlibstorage
<zlibstorage {name}>
  <filestorage>
    path {name}.fs
  </filestorage>
</zlibstorage>
"""


@pytest.mark.slow
class HexOverMappingStorageTests(EveryStorage):
    """Below the wrapper may be anything."""

    storage = """\
%import ZODB.tests
<hexstorage {name}>
  <mappingstorage/>
</hexstorage>
"""

    # It has no undo.
    testLoadBeforeUndo = None


# Or they would be collected as tests of their own.
del EveryStorage, LogStorage, ServedStorage, TransactionalUndoStorage
del ConflictResolvingTransUndoStorage, PackableStorageWithOptionalGC
del PackableUndoStorage, IteratorStorage, ExtendedIteratorStorage
