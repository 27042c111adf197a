"""Who may vote: locks on objects, all or none, first come first served.

A transaction *claims* the objects that it writes, those that it only depends on, or
everything. Claims that have nothing in common but what both only depend on are held
side by side; the others wait for each other. A Locks is pure: it belongs to the
server's loop, holders are compared by identity, and nothing in it knows the time.

Invariants:

1. Two claims that conflict are never held at once.
2. A claim gets all of its objects or none, and waits only for claims that came before
   it and conflict with it. So nobody can wait in a circle, and nobody is overtaken by
   those who want the same: a claim that waits is in the way of later ones already.
3. Whoever leaves, for whatever reason, holding or waiting, lets all go on who waited
   for nobody else: ``leave`` returns them, and there is no claim that waits for nobody.
"""

from collections.abc import Set
from typing import Any, Generic, NamedTuple, TypeVar


class Claim(NamedTuple):
    """What a transaction needs to itself, from vote to finish."""

    writes: Set[bytes] = frozenset()
    # Nobody may write these, but others may depend on them, too.
    depends_on: Set[bytes] = frozenset()
    is_alone: bool = False


ALONE = Claim(is_alone=True)


Holder = TypeVar("Holder")


class _Place(Generic[Holder]):
    """A claim in the order of arrival."""

    __slots__ = ("behind", "depends_on", "holder", "is_alone", "waits_for", "writes")

    def __init__(self, holder: Holder, claim: Claim):
        self.holder = holder
        # Sets: the smaller one is walked through when two are compared.
        self.writes, self.depends_on = claim.writes, claim.depends_on
        self.is_alone = claim.is_alone
        # How many it waits for, and who waits for it.
        self.waits_for = 0
        self.behind: list[_Place[Holder]] = []

    @property
    def is_free(self) -> bool:
        """Whether it holds all that it claims."""
        return not self.waits_for

    def conflicts_with(self, other: "_Place[Any]") -> bool:
        if self.is_alone or other.is_alone:
            return True
        if not self.writes.isdisjoint(other.writes):
            return True
        if self.depends_on and not self.depends_on.isdisjoint(other.writes):
            return True
        return bool(other.depends_on) and not self.writes.isdisjoint(other.depends_on)


class Locks(Generic[Holder]):
    """The claims of one database, in the order in which they came."""

    def __init__(self) -> None:
        self._places: dict[Holder, _Place[Holder]] = {}

    @property
    def holders(self) -> tuple[Holder, ...]:
        """Those who hold what they claim, first come first."""
        return tuple(each.holder for each in self._places.values() if each.is_free)

    @property
    def waiting(self) -> tuple[Holder, ...]:
        """Those who wait, first come first."""
        return tuple(each.holder for each in self._places.values() if not each.is_free)

    def request(self, holder: Holder, claim: Claim) -> bool:
        """Claim; true if all of it is held at once. Takes time by those who came."""
        assert holder not in self._places, "one claim at a time"
        place = _Place(holder, claim)
        for earlier in self._places.values():
            if place.conflicts_with(earlier):
                earlier.behind.append(place)
                place.waits_for += 1
        self._places[holder] = place
        return place.is_free

    def leave(self, holder: Holder) -> list[Holder]:
        """Give up what is held, or the place in the line.

        Returns those who hold their claims from now on, first come first. Leaving
        twice, or without having requested, changes nothing.
        """
        place = self._places.pop(holder, None)
        if place is None or not place.behind:
            return []
        for later in place.behind:
            later.waits_for -= 1
        return [
            later.holder
            for later in place.behind
            # Some of them may have left before.
            if later.is_free and self._places.get(later.holder) is later
        ]
