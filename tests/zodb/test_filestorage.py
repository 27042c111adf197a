"""A FileStorage behind a server is a FileStorage."""

from .served import EveryStorage


class FileStorageTests(EveryStorage):
    storage = """\
<filestorage {name}>
  path {name}.fs
</filestorage>
"""

    def test_race_external_invalidate_vs_disconnect(self) -> None:
        # Not slow here.
        super().test_race_external_invalidate_vs_disconnect()


del EveryStorage
