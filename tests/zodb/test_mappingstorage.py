"""A MappingStorage behind a server is one, and resolves conflicts, which it is not."""

from .served import EveryStorage


class MappingStorageTests(EveryStorage):
    storage = "<mappingstorage {name}/>\n"

    # It has no undo.
    testLoadBeforeUndo = None


del EveryStorage
