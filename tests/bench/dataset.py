"""The Data.fs that every peer serves a copy of, made by plain ZODB.

``root["shelves"]`` is a list of shelves, each a list of ITEMS_PER_SHELF items; an item
is a PersistentMapping of which one record takes about 500 bytes. A client that has
its shelf in memory reads each item with exactly one load, and clients with different
shelves write nothing in common.

``root["tree"]`` is a BTree of TREE_ITEMS such items, made in the order of its keys, so
that its buckets are half full, as they are in most trees that grow at one end.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transaction
from BTrees.OOBTree import OOBTree
from persistent.list import PersistentList
from persistent.mapping import PersistentMapping
from ZODB.DB import DB
from ZODB.FileStorage.FileStorage import FileStorage

ITEMS_PER_SHELF = 1000
# One for each process of the largest crew that commits.
SHELVES = 32
PAYLOAD_BYTES = 430
TREE_ITEMS = 100_000
ITEMS_PER_TRANSACTION = 5000


def payload() -> bytes:
    """Something new to store in an item."""
    return os.urandom(PAYLOAD_BYTES)


def new_shelf(items: int = ITEMS_PER_SHELF) -> Any:
    """A list of new items."""
    return PersistentList(PersistentMapping(data=payload()) for _ in range(items))


def make(path: Path) -> None:
    """Write the data set to ``path``, with its index."""
    db = DB(FileStorage(str(path)))
    with db.transaction() as connection:
        connection.root()["shelves"] = PersistentList()
        connection.root()["inserted"] = PersistentList()
    for _ in range(SHELVES):
        with db.transaction() as connection:
            connection.root()["shelves"].append(new_shelf())
    _grow_tree(db)
    db.close()


def _grow_tree(db: Any) -> None:
    with db.transaction() as connection:
        connection.root()["tree"] = OOBTree()
    for start in range(0, TREE_ITEMS, ITEMS_PER_TRANSACTION):
        with db.transaction() as connection:
            tree = connection.root()["tree"]
            for number in range(start, start + ITEMS_PER_TRANSACTION):
                tree[tree_key(number)] = PersistentMapping(data=payload())


def tree_key(number: int) -> str:
    """The key in the tree of an item, by its place."""
    return f"document-{number:06}"


def shelf(connection: Any, number: int) -> list[Any]:
    """The items of a shelf, which are ghosts as long as nobody has used them."""
    return list(connection.root()["shelves"][number])


def oids(connection: Any, numbers: Iterator[int] | range) -> list[bytes]:
    """The oids of all items of some shelves."""
    found = [item._p_oid for number in numbers for item in shelf(connection, number)]
    transaction.abort()
    return found
