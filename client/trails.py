"""What a thread will load next, guessed from what it has missed: a pure predictor.

Three kinds of steps are recognised, each from the second or third of them on:

* objects that one record refers to, in its order (the values of a bucket, the items of
  a list): two in a row start a ``Walk`` that expects the others;
* objects linked to each other, as the buckets of a BTree are: three in a row start a
  walk that expects only the next ones;
* both at once: a walk through what a bucket refers to goes on in the next bucket.

A walk asks for few objects first, and for twice as many whenever enough of what was
sent was used; for half as many when it was in vain. A thread whose walks come to
nothing has its guesses passed over, more and more of them (``Trial``), until one comes
true. A walk that has come to the largest number of objects says what comes after those
(``go_forward``), before they are used, so that nobody has to wait for it.

Who loads at random pays a microsecond or two: the last record that refers to others is
searched, and more of them only as long as that leads somewhere; nothing is parsed
before two steps were made in order. Nothing here is unpickled, and a wrong guess costs
some records that nobody needs (protocol.references). A ``Trail`` belongs to one thread,
so that what another one does confuses nobody, and is bounded: some records and walks.
"""

from typing import NamedTuple

from zeolith.client.round_trip import Trial
from zeolith.protocol.references import LINK_BYTES_MAX, link_of, references

# How many objects are asked for at once, at first and at most: a third of a
# millisecond of the server's. More of them bring next to nothing: see
# docs/performance.md.
WINDOW_MIN = 8
WINDOW_MAX = 128
# A walk that would ask for less is over.
WINDOW_LEAST = 4
# To be used are at least: half of a batch, or there is no larger one; and a quarter, or
# it was not worth it. A round trip costs as much as ten records.
VERY_GOOD_PART = 2
GOOD_PART = 4
# Records that are worth a look: with a few references, the last one at the end, as it
# is in buckets, lists and mappings, and not too long to search.
REFERENCES_MIN = 4
END_BYTES = 16
RECORD_BYTES_MAX = 64 * 1024
# Two references in a row are not further apart, and at most one is between them.
STEP_BYTES_MAX = 1024
# How often a record was searched in vain before it is no more looked at.
STRIKES_MAX = 8
# Of a thread. A walk may be within another one.
RECORDS_MAX = 4
WALKS_MAX = 3
# After so many records that led to no walk only one of three is searched, until the
# next one comes; and after so many it is done as in the beginning.
TIRED_LOOKS = 50
TIRED_STEP = 3
RESTED_LOOKS = 1000
# Steps from one linked object to the next, before the others are asked for.
LINKS_MIN = 2


class Batch:
    """What one answer has brought ahead of time; counted by whoever uses it."""

    __slots__ = ("sent", "used")

    def __init__(self) -> None:
        self.sent = self.used = 0


class Wish(NamedTuple):
    """What to ask for: objects, the first of which is needed now, and links behind."""

    oids: list[bytes]
    links: int


class Walk:
    """Objects that are expected in an order."""

    __slots__ = (
        "_asked",
        "_expected",
        "_next_batch",
        "_width",
        "_window",
        "batch",
        "forward",
        "is_spent",
        "link",
        "places",
        "steps",
    )

    def __init__(self, steps: bool):
        # Whether it steps on what the records refer to, or only from link to link.
        self.steps = steps
        self.batch = Batch()
        # What follows the last record that was entered.
        self.link: bytes | None = None
        # Whether all that it expects has been asked for.
        self.is_spent = False
        # What was asked for before it is needed, and what its answer brings.
        self.forward: Wish | None = None
        self._next_batch = self.batch
        # What is still expected, and how much of that has been asked for.
        self._expected: list[bytes] = []
        self._asked = 0
        # Where in that each of them is.
        self.places: dict[bytes, int] = {}
        # References of a record.
        self._width = 1
        self._window = WINDOW_MIN

    def enter(self, record: bytes) -> None:
        """Expect what ``record`` refers to, which is the first one, or the link."""
        if self._expected and self._expected[-1] == self.link:
            # It is here.
            self.places.pop(self._expected.pop(), None)
            self._asked = min(self._asked, len(self._expected))
        self.link = link_of(record)
        found: list[bytes] = []
        if self.steps and len(record) <= RECORD_BYTES_MAX:
            found = references(record)
        elif self.link is not None:
            found = [self.link]
        self._width = len(found) or 1
        for place, oid in enumerate(found, len(self._expected)):
            self.places[oid] = place
        self._expected += found

    def is_good(self) -> bool:
        """Whether the last batch was worth it."""
        return self.batch.used * GOOD_PART >= self.batch.sent

    def go_to(self, oid: bytes) -> Wish | None:
        """What to ask for now that ``oid`` was missed; None: the walk is over."""
        self._judge()
        if self._window < WINDOW_LEAST:
            return None
        self.forward = None
        self._next_batch = self.batch = Batch()
        wish = self._wish_from(self.places[oid])
        return wish if wish.links or len(wish.oids) > 1 else None

    def go_forward(self) -> Wish | None:
        """What to ask for before it is needed; None: that is not sure enough."""
        if self._window < WINDOW_MAX or self._asked >= len(self._expected):
            return None
        self._next_batch = Batch()
        self.forward = self._wish_from(self._asked)
        return self.forward

    def arrive(self) -> Wish:
        """What was asked for beforehand is needed now."""
        wish, self.forward = self.forward, None
        assert wish is not None
        self._judge()
        self.batch = self._next_batch
        return wish

    def _judge(self) -> None:
        batch = self.batch
        if batch.sent:
            if batch.used * VERY_GOOD_PART >= batch.sent:
                self._window = min(2 * self._window, WINDOW_MAX)
            elif not self.is_good():
                self._window //= 2

    def _wish_from(self, place: int) -> Wish:
        expected = self._expected = self._expected[place:]
        self.places = {each: at for at, each in enumerate(expected)}
        oids = expected[: self._window]
        self._asked = len(oids)
        links = 0
        if len(oids) == len(expected):
            self.is_spent = self.link is None
            if not self.is_spent:
                # As many as the next window has room for, with the link itself.
                links = max(0, self._window // self._width - 1)
        return Wish(oids, links)


class _Seen:
    """A record that refers to others, and where in it the thread was last."""

    __slots__ = ("_at", "_steps", "links", "record", "strikes")

    def __init__(self, record: bytes, links: int):
        self.record = record
        # How many links led here, one after the other.
        self.links = links
        self.strikes = 0
        self._at = -1
        self._steps = 0

    def steps_to(self, at: int) -> int:
        """How many steps in order led to the reference that is found at ``at``."""
        record, before = self.record, self._at
        self._at = at
        if before < 0:
            self._steps = 1
        elif (
            before < at <= before + STEP_BYTES_MAX
            # Its own mark, and that of one that is here already.
            and record.count(b"C\x08", before, at) <= 2
        ):
            self._steps += 1
            self.strikes = 0
        else:
            self._steps = 1
            self.strikes += 2
        return self._steps


class Trail:
    """What one thread has missed."""

    __slots__ = ("_link", "_looks", "_seen", "_spent", "_trial", "_walks", "latest")

    def __init__(self) -> None:
        # What the thread wanted and got last, if nobody has looked at it.
        self.latest: tuple[bytes, bytes] | None = None
        # The latest first.
        self._seen: list[_Seen] = []
        self._walks: list[Walk] = []
        # The last one of which everything was asked for, and that is not judged yet.
        self._spent = Walk(steps=True)
        self._trial = Trial()
        # Records looked at since the last walk began.
        self._looks = 0
        # What was missed last as the link of a record, and how many led there.
        self._link: tuple[bytes, int] = (b"", 0)

    def missed(self, oid: bytes) -> tuple[Walk, Wish] | None:
        """What to ask for instead of ``oid`` alone, if anything."""
        for walk in self._walks:
            if oid in walk.places:
                return self._go_on(walk, oid)
        # Every load comes here that is in no cache: what follows is spelled out.
        latest = self.latest
        if latest is not None:
            self.latest = None
            if b"Q" in latest[1][-END_BYTES:]:
                self._look_at(*latest)
        for seen in self._seen:
            at = seen.record.find(oid)
            if at >= 0:
                return self._step(seen, oid, at)
            seen.strikes += 1
            if seen.strikes >= STRIKES_MAX:
                self._forget(seen)
        return None

    def _look_at(self, oid: bytes, record: bytes) -> None:
        looks = self._looks = self._looks + 1
        others = self._seen
        if looks > TIRED_LOOKS:
            others = []
            if looks % TIRED_STEP:
                self._seen = others
                return
            if looks > RESTED_LOOKS:
                self._looks = 0
        if len(record) <= RECORD_BYTES_MAX and (
            # Each reference ends with one.
            record.count(b"Q") >= REFERENCES_MIN or link_of(record)
        ):
            linked, links = self._link
            seen = _Seen(record, links if linked == oid else 0)
            self._seen = [seen, *others[: RECORDS_MAX - 1]]

    def _step(self, seen: _Seen, oid: bytes, at: int) -> tuple[Walk, Wish] | None:
        steps = seen.steps_to(at)
        if seen.strikes >= STRIKES_MAX:
            self._forget(seen)
            return None
        if steps >= 2:
            return self._begin(seen, oid, Walk(steps=True))
        if at > len(seen.record) - LINK_BYTES_MAX and oid == link_of(seen.record):
            self._link = oid, seen.links + 1
            if seen.links + 1 > LINKS_MIN:
                return self._begin(seen, oid, Walk(steps=False))
        return None

    def _begin(self, seen: _Seen, oid: bytes, walk: Walk) -> tuple[Walk, Wish] | None:
        if not self._trial.is_due():
            return None
        self._forget(seen)
        self._looks = 0
        walk.enter(seen.record)
        return self._go_on(walk, oid) if oid in walk.places else None

    def _go_on(self, walk: Walk, oid: bytes) -> tuple[Walk, Wish] | None:
        self._judge(walk)
        if walk.forward is not None and oid in walk.forward.oids:
            wish: Wish | None = walk.arrive()
        else:
            wish = walk.go_to(oid)
        others = [each for each in self._walks if each is not walk]
        if wish is None:
            self._walks = others
            return None
        self._walks = [walk, *others]
        if walk.is_spent:
            # It must not take the place of one that goes on.
            self._walks = others
            self._judge(self._spent)
            self._spent = walk
        elif len(self._walks) > WALKS_MAX:
            self._judge(self._walks.pop())
        return walk, wish

    def _judge(self, walk: Walk) -> None:
        if walk.batch.sent:
            self._trial.ended(not walk.is_good())

    def _forget(self, seen: _Seen) -> None:
        self._seen = [each for each in self._seen if each is not seen]
