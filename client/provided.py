"""What a storage can do depends on its server's: ZODB's interfaces that it provides.

Called with each session, before anybody uses it.
"""

from collections.abc import Iterable
from typing import Any

from ZODB import interfaces
from zope.interface import alsoProvides

# What we can do if the server's storage can.
_OPTIONAL_INTERFACES = {
    interface.__name__: interface
    for interface in (
        interfaces.IExternalGC,
        interfaces.IStorageCurrentRecordIteration,
        interfaces.IStorageIteration,
        interfaces.IStorageRestoreable,
        interfaces.IStorageUndoable,
    )
}
# And if there is a blob_dir.
_BLOB_INTERFACES = {
    "IBlobStorage": interfaces.IBlobStorage,
    "IBlobStorageRestoreable": interfaces.IBlobStorageRestoreable,
}


def provide(storage: Any, names: Iterable[str], *, has_blobs: bool) -> None:
    """Let ``storage`` provide what the server names, of what it could."""
    for name in names:
        interface = _OPTIONAL_INTERFACES.get(name)
        if has_blobs:
            interface = _BLOB_INTERFACES.get(name, interface)
        if interface is not None and not interface.providedBy(storage):
            alsoProvides(storage, interface)
