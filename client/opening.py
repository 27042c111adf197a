"""From an address to an open database, in one call."""

import inspect
from typing import Any

import ZODB
from ZODB.POSException import ConflictError

from zeolith.client.storage import ClientStorage

_STORAGE_ARGUMENTS = frozenset(inspect.signature(ClientStorage).parameters) - {"addr"}
_DATABASE_ARGUMENTS = frozenset(inspect.signature(ZODB.DB).parameters)


def DB(addr: Any, **arguments: Any) -> ZODB.DB:
    """A ZODB.DB over a ClientStorage.

    Arguments that ClientStorage has go there, all others to ZODB.DB.
    """
    for_storage = {
        name: arguments.pop(name) for name in _STORAGE_ARGUMENTS & arguments.keys()
    }
    # ZODB.DB would take them for arguments of a storage that it has to make.
    if unknown := arguments.keys() - _DATABASE_ARGUMENTS:
        raise TypeError(f"there is no argument {', '.join(sorted(unknown))}")
    storage = ClientStorage(addr, **for_storage)
    try:
        try:
            return ZODB.DB(storage, **arguments)
        except ConflictError:
            # Somebody else made the root of the empty database at the same moment.
            (arguments.get("databases") or {}).pop(_database_name(arguments), None)
            return ZODB.DB(storage, **arguments)
    except BaseException:
        storage.close()
        raise


def _database_name(arguments: dict[str, Any]) -> str:
    return str(arguments.get("database_name", "unnamed"))


def connection(addr: Any, **arguments: Any) -> Any:
    """An open ZODB connection to a database of its own, which is closed with it."""
    return DB(addr, **arguments).open_then_close_db_when_connection_closes()
