"""ZODB's own text on IExternalGC, over a server process."""

import doctest
from pathlib import Path
from typing import Any

from ZODB.tests import PackableStorage

from .served import ServedStorage


class ExternalCollectionTests(ServedStorage):
    storage = """\
<filestorage {name}>
  path {name}.fs
  blob-dir {name}.blobs
  pack-gc false
</filestorage>
"""

    def test_objects_are_deleted_as_zodb_describes_it(self) -> None:
        self._storage.close()
        storage: Any = self._client(blob_dir="blobs")
        pack = storage.pack

        def pack_and_forget(*args: Any) -> None:
            # Old revisions stay in the caches of clients, their blobs too.
            pack(*args)
            storage.cache.forget_all(storage.cache.valid_through)
            for path in Path("blobs").rglob("*.blob"):
                path.unlink()

        storage.pack = pack_and_forget
        path = Path(PackableStorage.__file__).with_name("IExternalGC.test")
        names = {"create_storage": lambda: storage}
        parser = doctest.DocTestParser()
        test = parser.get_doctest(path.read_text(), names, "gc", str(path), 0)
        assert len(test.examples) > 30
        said: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
        runner.run(test, out=said.append)
        assert not said, "".join(said)


del ServedStorage
