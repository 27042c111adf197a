"""The server's transaction log in ZODB's form: undo logs and histories.

The wire gives ``(tid, user, description, extension, size)``; ZODB wants dictionaries
in which the extension's items stand beside the rest. Paging and filtering are done
here, so a filter may be any function. Used by the calling thread.
"""

import logging
from base64 import encodebytes
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from persistent.TimeStamp import TimeStamp

from zeolith.client.extensions import load_extension

logger = logging.getLogger(__name__)

BATCH = 100

Description = dict[str, Any]


def describe(entry: Sequence[Any]) -> Description:
    """An entry of the log in ZODB's form; an extension nobody can read is left out."""
    tid, user, description, extension, size = entry
    described: Description = {
        "time": TimeStamp(tid).timeTime(),
        "user_name": user,
        "description": description,
        "size": size,
    }
    if extension:
        try:
            described.update(load_extension(extension))
        except Exception as error:  # noqa: BLE001 - whatever a pickle may be
            logger.warning("the extension of %s is unreadable: %s", tid.hex(), error)
    return described


def undoable(call: Callable[..., list[Any]]) -> Iterator[Description]:
    """All transactions that may be undone, newest first, with the ``id`` for undo."""
    before = None
    while True:
        entries = call("undo_log", before, BATCH)
        for entry in entries:
            yield {**describe(entry), "id": encodebytes(entry[0]).rstrip()}
        if len(entries) < BATCH:
            return
        before = entries[-1][0]


def between(
    descriptions: Iterable[Description],
    first: int,
    last: int,
    wanted: Callable[[Description], bool] | None,
) -> list[Description]:
    """Those from number ``first`` to ``last`` that are wanted, counted from 0.

    A negative ``last`` is how many there may be (IStorageUndoable.undoLog).
    """
    if last < 0:
        last = first - last
    found: list[Description] = []
    number = 0
    for description in descriptions:
        if number >= last:
            break
        if wanted is None or wanted(description):
            if number >= first:
                found.append(description)
            number += 1
    return found


def having(specification: dict[str, Any]) -> Callable[[Description], bool]:
    """Whether a description has all of ``specification`` (undoInfo)."""

    def has_all(description: Description) -> bool:
        # The specified value is on the left: it may be a ZopeUndo Prefix.
        return all(
            key in description and value == _as_type_of(value, description[key])
            for key, value in specification.items()
        )

    return has_all


def _as_type_of(wanted: Any, value: Any) -> Any:
    """``value`` as text if it is compared with text; ZODB has bytes there."""
    if isinstance(value, bytes) and not isinstance(wanted, bytes):
        return value.decode("utf-8", "replace")
    return value
