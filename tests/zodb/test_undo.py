"""A FileStorage behind a server undoes as a FileStorage does."""

from ZODB.tests.ConflictResolution import ConflictResolvingTransUndoStorage
from ZODB.tests.HistoryStorage import HistoryStorage
from ZODB.tests.PackableStorage import PackableUndoStorage
from ZODB.tests.TransactionalUndoStorage import TransactionalUndoStorage

from .served import ServedStorage


class UndoTests(
    ServedStorage,
    TransactionalUndoStorage,
    ConflictResolvingTransUndoStorage,
    HistoryStorage,
    PackableUndoStorage,
):
    storage = """\
<filestorage {name}>
  path {name}.fs
</filestorage>
"""

    # ZODB sets this process's clock for it; the one that counts is the server's.
    testPackUndoLog = PackableUndoStorage.testPackUndoLog.__wrapped__


# Or they would be collected as tests of their own.
del ServedStorage, TransactionalUndoStorage, ConflictResolvingTransUndoStorage
del HistoryStorage, PackableUndoStorage
