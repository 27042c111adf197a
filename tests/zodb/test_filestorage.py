"""A FileStorage behind a server is a FileStorage."""

from .served import EveryStorage


class FileStorageTests(EveryStorage):
    storage = """\
<filestorage {name}>
  path {name}.fs
</filestorage>
"""


del EveryStorage
