"""Sequences of misses, and what is asked for."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeolith.client.round_trip import SKIPPED_MAX
from zeolith.client.trails import (
    RECORD_BYTES_MAX,
    RECORDS_MAX,
    RESTED_LOOKS,
    STRIKES_MAX,
    TIRED_LOOKS,
    TIRED_STEP,
    WALKS_MAX,
    WINDOW_MAX,
    WINDOW_MIN,
    Trail,
    Walk,
    Wish,
)
from zeolith.protocol.references import link_of

from ..support.ids import number

LEAF = b"\x80\x03cm\nC\nq\x00.\x80\x03}q\x01."


def bucket(values: Iterable[bytes], link: bytes | None = None) -> bytes:
    """A record that refers to ``values`` in this order, and is linked."""
    record = b"\x80\x03cm\nBucket\nq\x00.\x80\x03("
    for oid in values:
        record += b"U\x03keyC\x08" + oid + b"q\x01h\x01\x86Q"
    record += b"t"
    if link is not None:
        record += b"C\x08" + link + b"q\x02h\x00\x86Q\x86"
    return record + b"."


class Tree:
    """Buckets in a row; their oids are round numbers, those of values follow."""

    def __init__(self, buckets: int, width: int):
        self.oids: list[bytes] = []
        self.records: dict[bytes, bytes] = {}
        self.buckets = [number(1000 * (n + 1)) for n in range(buckets)]
        for n, oid in enumerate(self.buckets):
            values = [number(1000 * (n + 1) + each + 1) for each in range(width)]
            link = self.buckets[n + 1] if n + 1 < buckets else None
            self.records[oid] = bucket(values, link)
            self.records.update(dict.fromkeys(values, LEAF))
            self.oids += [oid, *values]


class Reader:
    """A thread without a cache, whose server knows all of ``records``."""

    def __init__(self, records: dict[bytes, bytes], trail: Trail | None = None):
        self.records = records
        self.trail = trail or Trail()
        self.held: dict[bytes, Any] = {}
        # Those that it waits for, and what it does not wait for yet.
        self.round_trips = 0
        self.forward: Wish | None = None
        self.sent = self.used = 0
        self.wishes: list[Wish] = []

    def read(self, oid: bytes) -> None:
        if oid in self.held:
            batch = self.held.pop(oid)
            self.used += 1
            if batch is not None:
                batch.used += 1
            self.trail.latest = oid, self.records[oid]
            return
        self.round_trips += 1
        step = self.trail.missed(oid)
        if step is None:
            self.trail.latest = oid, self.records[oid]
            return
        walk, wish = step
        is_forward = wish is self.forward
        if is_forward:
            self.round_trips -= 1
        self.wishes.append(wish)
        needed = None if is_forward else oid
        self._get(walk, wish, needed)
        if is_forward:
            self.used += 1
            batch = self.held.pop(oid)
            if batch is not None:
                batch.used += 1
            self.trail.latest = oid, self.records[oid]
        else:
            assert wish.oids[0] == oid
        self.forward = walk.go_forward() or self.forward

    def _get(self, walk: Walk, wish: Wish, needed: bytes | None) -> None:
        came = [each for each in wish.oids if each in self.records]
        for _ in range(wish.links):
            link = link_of(self.records[came[-1]])
            if link is None:
                break
            came.append(link)
        for each in came:
            is_link = each == walk.link
            if is_link:
                walk.enter(self.records[each])
            if each != needed:
                self.sent += 1
                batch = None if is_link and walk.steps else walk.batch
                if batch is not None:
                    batch.sent += 1
                self.held[each] = batch

    def read_all(self, oids: Iterable[bytes]) -> "Reader":
        for oid in oids:
            self.read(oid)
        return self


def test_a_walk_through_a_tree_takes_few_round_trips():
    tree = Tree(buckets=200, width=15)
    reader = Reader(tree.records).read_all(tree.oids)
    assert reader.round_trips < len(tree.oids) / 80
    # All that was sent was used, in the end.
    assert reader.used == reader.sent
    assert max(len(wish.oids) for wish in reader.wishes) <= WINDOW_MAX


def test_a_long_walk_soon_waits_for_nothing():
    """What comes next is asked for before it is needed."""
    tree = Tree(buckets=1000, width=15)
    reader = Reader(tree.records).read_all(tree.oids)
    assert reader.round_trips < 12
    assert reader.used == reader.sent


def test_what_was_asked_for_beforehand_is_judged_by_itself():
    walk = Walk(steps=True)
    walk.enter(bucket(number(n) for n in range(1000)))
    place = 0
    while (forward := walk.go_forward()) is None:
        wish = walk.go_to(number(place))
        assert wish is not None
        place += len(wish.oids)
        walk.batch.sent = walk.batch.used = len(wish.oids) - 1
    assert forward.oids[0] == number(place)
    assert walk.arrive() is forward
    assert walk.batch.sent == walk.batch.used == 0
    walk.batch.sent = len(forward.oids)
    assert walk.go_forward() is not None
    walk.arrive()
    # It was not used.
    assert walk.go_forward() is None


def test_nothing_is_asked_for_beforehand_in_a_short_walk():
    tree = Tree(buckets=10, width=15)
    reader = Reader(tree.records)
    reader.read_all(tree.oids[:50])
    assert len(reader.wishes) > 2
    assert reader.forward is None


def test_a_walk_that_skips_into_what_was_asked_for_beforehand_goes_on():
    tree = Tree(buckets=1000, width=15)
    reader = Reader(tree.records).read_all(tree.oids[:2000])
    waited = reader.round_trips
    assert reader.forward is not None
    skipped = reader.forward.oids[3:]
    reader.read_all(tree.oids[tree.oids.index(skipped[0]) :])
    assert reader.round_trips == waited


def test_a_walk_that_skips_beyond_it_asks_again():
    tree = Tree(buckets=1000, width=15)
    reader = Reader(tree.records).read_all(tree.oids[:2000])
    waited = reader.round_trips
    reader.read_all(tree.oids[4000:])
    assert waited < reader.round_trips < waited + 12


def test_two_steps_start_it_and_little_is_asked_for_at_first():
    tree = Tree(buckets=3, width=30)
    reader = Reader(tree.records).read_all(tree.oids[:3])
    # The bucket, its first value, and the second, with some more.
    assert reader.wishes == [Wish(tree.oids[2 : 2 + WINDOW_MIN], 0)]
    reader.read_all(tree.oids[3 : 2 + WINDOW_MIN])
    assert len(reader.wishes) == 1
    reader.read(tree.oids[2 + WINDOW_MIN])
    assert len(reader.wishes[1].oids) == 2 * WINDOW_MIN


def test_a_walk_goes_on_in_the_next_bucket():
    tree = Tree(buckets=2, width=4)
    reader = Reader(tree.records).read_all(tree.oids)
    # What is left of the first bucket, the second one, which is its link; and what
    # that refers to.
    assert reader.wishes == [Wish(tree.oids[2:6], 0), Wish(tree.oids[6:], 0)]
    assert reader.round_trips == 4


def test_as_many_buckets_are_asked_for_as_the_next_round_trip_needs():
    tree = Tree(buckets=100, width=15)
    reader = Reader(tree.records).read_all(tree.oids)
    last = reader.wishes[-3]
    assert last.links == WINDOW_MAX // 16 - 1
    assert len(last.oids) == WINDOW_MAX // 16 * 15 + 1


@pytest.mark.parametrize("width", [0, 15])
def test_who_needs_only_the_buckets_gets_no_values(width):
    """As one does who looks at the keys, or prefetches the values."""
    tree = Tree(buckets=300, width=width)
    reader = Reader(tree.records).read_all(tree.buckets)
    assert reader.round_trips < 10
    assert reader.used == reader.sent
    assert all(len(wish.oids) == 1 for wish in reader.wishes)


def test_a_list_is_walked_through():
    values = [number(n) for n in range(10, 1010)]
    records = {number(1): bucket(values), **dict.fromkeys(values, LEAF)}
    reader = Reader(records).read_all([number(1), *values])
    assert reader.round_trips < 20
    assert reader.used == reader.sent == len(values) + 1 - reader.round_trips


def test_what_belongs_to_each_value_does_not_end_a_walk():
    tree = Tree(buckets=20, width=15)
    parts = {oid: number(10**6 + n) for n, oid in enumerate(tree.oids)}
    tree.records.update(dict.fromkeys(parts.values(), LEAF))
    reader = Reader(tree.records)
    reader.read_all(each for oid in tree.oids for each in (oid, parts[oid]))
    assert reader.round_trips < len(parts) + 30


def test_a_value_in_between_may_be_left_out():
    tree = Tree(buckets=20, width=15)
    some = [oid for n, oid in enumerate(tree.oids) if n % 4 != 3 or oid in tree.buckets]
    reader = Reader(tree.records).read_all(some)
    assert reader.round_trips < len(some) / 8


def test_a_walk_within_a_walk_confuses_neither():
    outer = Tree(buckets=10, width=10)
    lists = {}
    for n, oid in enumerate(outer.oids):
        if oid not in outer.buckets:
            values = [number(10**6 * (n + 1) + each) for each in range(40)]
            outer.records[oid] = bucket(values)
            outer.records.update(dict.fromkeys(values, LEAF))
            lists[oid] = values
    steps = [each for oid in outer.oids for each in (oid, *lists.get(oid, ()))]
    reader = Reader(outer.records).read_all(steps)
    assert reader.round_trips < len(steps) / 6


def test_random_access_asks_for_nothing():
    tree = Tree(buckets=100, width=30)
    values = [oid for oid in tree.oids if oid not in tree.buckets]
    chance = random.Random(1)
    reader = Reader(tree.records)
    for _ in range(3000):
        oid = chance.choice(values)
        reader.read_all([tree.buckets[tree.oids.index(oid) // 31], oid])
    # Now and then two in a row happen to be neighbours.
    assert reader.sent < 6000 / 50


def test_random_access_to_what_one_record_refers_to_asks_for_nothing():
    values = [number(n) for n in range(10, 1010)]
    records = {number(1): bucket(values), **dict.fromkeys(values, LEAF)}
    random.Random(1).shuffle(values)
    reader = Reader(records).read_all([number(1), *values])
    assert reader.sent < 10
    # It is not searched any more.
    assert not reader.trail._seen


def test_who_steps_over_most_of_them_is_not_walking():
    values = [number(n) for n in range(10, 1010)]
    records = {number(1): bucket(values), **dict.fromkeys(values, LEAF)}
    reader = Reader(records).read_all([number(1), *values[::4]])
    assert not reader.wishes


def searched(trail: Trail) -> int:
    """In how many records the next miss is looked for."""
    return len(trail._seen)


def test_a_record_that_has_nothing_to_do_with_the_misses_is_not_searched_for_ever():
    trail = Trail()
    trail.latest = number(1), bucket(number(n) for n in range(10, 20))
    for miss in range(STRIKES_MAX):
        assert trail.missed(number(1000 + miss)) is None
        assert searched(trail) == (miss + 1 < STRIKES_MAX)


def test_fewer_records_are_searched_where_that_leads_nowhere():
    """And now and then as many as in the beginning."""
    trail = Trail()
    records = []
    for n in range(RESTED_LOOKS + 20):
        trail.latest = number(n), bucket(number(10**6 + 10 * n + k) for k in range(9))
        assert trail.missed(number(10**7 + n)) is None
        records.append(searched(trail))
    assert records[3:TIRED_LOOKS] == [RECORDS_MAX] * (TIRED_LOOKS - 3)
    tired = records[TIRED_LOOKS + 3 : RESTED_LOOKS - 3]
    assert max(tired) == 1
    assert sum(tired) <= len(tired) / TIRED_STEP + 1
    assert records[-1] == RECORDS_MAX


def starts(reader: Reader, count: int) -> int:
    """Read three values of ``count`` buckets each; how often more was asked for."""
    before = len(reader.wishes)
    for n in range(count):
        values = [number(10**7 * (n + 1) + each) for each in range(30)]
        reader.records[number(n)] = bucket(values)
        reader.records.update(dict.fromkeys(values, LEAF))
        reader.read_all([number(n), *values[:3]])
    return len(reader.wishes) - before


def test_who_ends_each_walk_soon_is_hardly_ever_sent_anything():
    reader = Reader({})
    starts(reader, 100)
    # Two of three steps might begin a walk.
    assert starts(reader, 1000) <= 2 * 1000 / SKIPPED_MAX
    assert all(len(wish.oids) == WINDOW_MIN for wish in reader.wishes)


def test_and_is_sent_more_when_a_walk_goes_on():
    reader = Reader({})
    starts(reader, 100)
    tree = Tree(buckets=1000, width=15)
    reader.records.update(tree.records)
    reader.read_all(tree.oids)
    assert reader.wishes[-3].links


def test_a_long_walk_is_noticed_whatever_was_before():
    reader = Reader({})
    starts(reader, 100)
    values = [number(n) for n in range(2000, 3000)]
    reader.records.update({number(1999): bucket(values), **dict.fromkeys(values, LEAF)})
    before = reader.round_trips
    reader.read_all([number(1999), *values])
    assert reader.round_trips - before < SKIPPED_MAX + 20


def test_what_is_used_by_a_third_is_asked_for_in_small_parts():
    values = [number(n) for n in range(10, 1010)]
    records = {number(1): bucket(values), **dict.fromkeys(values, LEAF)}
    reader = Reader(records)
    some = [oid for n, oid in enumerate(values) if n < 3 or n % 3 == 0]
    reader.read_all([number(1), *some])
    assert {len(wish.oids) for wish in reader.wishes[:-1]} == {WINDOW_MIN}


def test_a_walk_of_which_nothing_is_used_ends():
    walk = Walk(steps=True)
    walk.enter(bucket(number(n) for n in range(100)))
    for place in (0, 20, 40):
        wish = walk.go_to(number(place))
        if wish is None:
            break
        walk.batch.sent = len(wish.oids) - 1
    assert wish is None


def test_an_object_that_is_the_last_one_is_loaded_as_ever():
    values = [number(n) for n in range(10, 16)]
    walk = Walk(steps=True)
    walk.enter(bucket(values))
    assert walk.go_to(values[-1]) is None


def test_records_that_take_long_to_search_are_not_looked_at():
    values = [number(n) for n in range(10, 10 + RECORD_BYTES_MAX // 15)]
    records = {number(1): bucket(values), **dict.fromkeys(values, LEAF)}
    assert len(records[number(1)]) > RECORD_BYTES_MAX
    reader = Reader(records).read_all([number(1), *values[:50]])
    assert not reader.wishes
    walk = Walk(steps=True)
    walk.enter(records[number(1)])
    assert not walk.places


def test_no_more_than_a_few_walks_are_remembered():
    reader = Reader({})
    for n in range(50):
        values = [number(10**7 * (n + 1) + each) for each in range(30)]
        reader.records[number(n)] = bucket(values)
        reader.records.update(dict.fromkeys(values, LEAF))
        reader.read_all([number(n), *values[:10]])
    assert len(reader.trail._walks) == WALKS_MAX


OIDS = st.integers(0, 30).map(number)


@st.composite
def records(draw: Any) -> bytes:
    """Buckets, other containers, and garbage that looks like both."""
    refs = draw(st.lists(OIDS, max_size=8))
    made = bucket(refs, draw(st.none() | OIDS))
    cut = draw(st.integers(0, len(made)))
    return draw(st.sampled_from([made, made[:cut] + made[-cut:], made * 2, LEAF]))


@given(st.dictionaries(OIDS, records()), st.lists(OIDS, max_size=120))
def test_whatever_is_read_in_whatever_order_nothing_is_raised(stored, reads):
    known = {number(n): LEAF for n in range(31)} | stored
    reader = Reader(known).read_all(reads)
    for wish in reader.wishes:
        assert 1 <= len(wish.oids) <= WINDOW_MAX
        assert 0 <= wish.links <= WINDOW_MAX
    for walk in reader.trail._walks:
        assert len(walk._expected) < 10_000
