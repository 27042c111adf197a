"""Storages that change records on their way, at either end of the wire."""

from typing import Any

import pytest
from ZODB.tests import hexstorage

from .served import EveryStorage


class HexStorage(hexstorage.HexStorage):
    """ZODB's own tells its database of a version, which no database takes any more."""

    def invalidate(self, transaction_id: bytes, oids: Any, _version: str = "") -> None:
        self.db.invalidate(transaction_id, oids)

    def iterator(self, *bounds: bytes | None) -> Any:
        # Not a generator: whoever asks must hear at once that there is none.
        return iter([*super().iterator(*bounds)])


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


del EveryStorage
