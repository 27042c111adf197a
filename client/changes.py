"""What a client hears of, or asks for: which objects a transaction has changed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple


class Change(NamedTuple):
    """One committed transaction: its predecessor, its tid, what it changed."""

    since: bytes
    tid: bytes
    oids: list[bytes]
    # The id its client chose; None where the server does not know it any more.
    transaction: bytes | None


# As Change._make makes one, but whatever the number of fields.
_new_change = partial(tuple.__new__, Change)
_LENGTHS = {len(Change._fields)}


def changes_of(rows: Sequence[Sequence[Any]]) -> list[Change]:
    """The changes that a message has as arrays; raises TypeError for others.

    Without a call of a Python function for each: whoever commits beside many is told of
    as many with every answer.
    """
    if rows and set(map(len, rows)) != _LENGTHS:
        raise TypeError(f"a change has {len(Change._fields)} fields")
    return list(map(_new_change, rows))


# The next changes after a tid, perhaps not all; None if nobody knows them any more.
# Raises if there is no server.
Ask = Callable[[bytes], list[Change] | None]


class UnknownWay(Exception):
    """Nobody knows any more what changed in between."""


def changes_between(ask: Ask | None, after: bytes, upto: bytes) -> list[Change] | None:
    """The changes after ``after`` and up to ``upto``.

    None if these are not both of the history of who is asked. Raises UnknownWay, and
    whatever ``ask`` raises.
    """
    changes: list[Change] = []
    at = after
    while at != upto:
        found = None if ask is None else ask(at)
        if found is None:
            raise UnknownWay
        found = [change for change in found if change.tid <= upto]
        if not found or found[0].since != at:
            return None
        changes += found
        at = found[-1].tid
    return changes
