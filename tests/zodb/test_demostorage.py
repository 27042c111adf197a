"""A DemoStorage behind a server is a DemoStorage, whatever it stands on."""

from .served import EveryStorage


class DemoStorageTests(EveryStorage):
    storage = "<demostorage {name}/>\n"

    # It has no undo.
    testLoadBeforeUndo = None


class DemoStorageOverFileStorageTests(DemoStorageTests):
    storage = """\
<demostorage {name}>
  <filestorage>
    path {name}.fs
  </filestorage>
</demostorage>
"""


del EveryStorage
