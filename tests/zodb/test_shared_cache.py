"""A FileStorage behind a server is one for clients that share a cache on disk."""

import tempfile
from typing import Any

from zeolith.client.storage import ClientStorage

from .served import EveryStorage


class SharedCacheTests(EveryStorage):
    storage = """\
<filestorage {name}>
  path {name}.fs
</filestorage>
"""
    # For all storages of the class: each has a file of its own in it.
    directory: tempfile.TemporaryDirectory[str]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.directory.cleanup)

    def tearDown(self) -> None:
        cache: Any = self._storage.cache
        super().tearDown()
        assert not cache.errors
        assert not cache.is_aside

    def _client(self, **options: Any) -> ClientStorage:
        return super()._client(cache=self.directory.name, **options)


del EveryStorage
