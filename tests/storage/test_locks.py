from collections.abc import Iterable
from itertools import combinations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zeolith.storage.locks import ALONE, Claim, Locks

A, B, C = b"a", b"b", b"c"


def claim(writes: Iterable[bytes] = (), depends_on: Iterable[bytes] = ()) -> Claim:
    return Claim(set(writes), set(depends_on))


@pytest.fixture
def locks() -> Locks[str]:
    return Locks()


def test_those_who_share_no_object_hold_theirs_side_by_side(locks):
    assert locks.request("first", claim([A], [C]))
    assert locks.request("second", claim([B], [C]))
    assert locks.holders == ("first", "second")
    assert not locks.waiting


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (claim([A]), claim([A, B])),
        (claim([A]), claim([B], [A])),
        (claim([B], [A]), claim([A])),
        (claim([A]), ALONE),
        (ALONE, claim([A])),
        (ALONE, claim()),
        (ALONE, ALONE),
    ],
)
def test_those_who_want_the_same_wait_for_each_other(locks, held, wanted):
    assert locks.request("first", held)
    assert not locks.request("second", wanted)
    assert (locks.holders, locks.waiting) == (("first",), ("second",))
    assert locks.leave("first") == ["second"]
    assert (locks.holders, locks.waiting) == (("second",), ())


def test_many_may_depend_on_what_nobody_writes(locks):
    assert all(locks.request(name, claim([], [A])) for name in ("first", "second"))
    assert not locks.request("writer", claim([A]))
    assert locks.leave("first") == []
    assert locks.leave("second") == ["writer"]


def test_nobody_overtakes_those_who_want_the_same(locks):
    """Or one who wants much would wait for ever."""
    locks.request("first", claim([A]))
    locks.request("wants much", claim([A, B]))
    assert not locks.request("third", claim([B]))
    assert locks.leave("first") == ["wants much"]
    assert locks.leave("wants much") == ["third"]


def test_who_leaves_the_line_lets_those_behind_go_on(locks):
    locks.request("first", claim([A]))
    locks.request("gone", ALONE)
    locks.request("third", claim([B]))
    locks.request("fourth", claim([A]))
    assert locks.leave("gone") == ["third"]
    assert locks.leave("first") == ["fourth"]


def test_all_that_one_was_in_the_way_of_go_on_first_come_first(locks):
    locks.request("alone", ALONE)
    for name, oid in (("first", A), ("second", B), ("behind first", A)):
        locks.request(name, claim([oid]))
    assert locks.leave("alone") == ["first", "second"]
    assert locks.waiting == ("behind first",)


def test_leaving_without_a_claim_changes_nothing(locks):
    locks.request("first", claim([A]))
    assert locks.leave("nobody") == []
    assert locks.leave("first") == []
    assert locks.leave("first") == []
    assert not locks.holders


def test_one_who_has_left_is_not_let_in_by_those_it_waited_for(locks):
    locks.request("first", claim([A]))
    locks.request("gone", claim([A]))
    locks.leave("gone")
    assert locks.leave("first") == []
    assert locks.request("gone", claim([A]))


def test_claims_may_come_as_any_set(locks):
    assert locks.request("first", Claim({A: 1}.keys(), frozenset([B])))
    assert not locks.request("second", Claim({B}))


CLAIMS = st.one_of(
    st.builds(
        claim,
        st.sets(st.sampled_from([A, B, C]), max_size=2),
        st.sets(st.sampled_from([A, B, C]), max_size=2),
    ),
    st.just(ALONE),
)


def conflict(one: Claim, other: Claim) -> bool:
    if one.is_alone or other.is_alone:
        return True
    ours, theirs = set(one.writes), set(other.writes)
    return bool(ours & (theirs | set(other.depends_on)) or theirs & set(one.depends_on))


class LocksAgainstTheirRules(RuleBasedStateMachine):
    """What is held is said by the order of arrival alone."""

    def __init__(self) -> None:
        super().__init__()
        self.locks: Locks[int] = Locks()
        self.claims: dict[int, Claim] = {}
        self.came = 0
        self.told: set[int] = set()

    @rule(wanted=CLAIMS)
    def request(self, wanted: Claim) -> None:
        self.came += 1
        self.claims[self.came] = wanted
        if self.locks.request(self.came, wanted):
            self.told.add(self.came)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(self.claims)))
        del self.claims[gone]
        self.told.discard(gone)
        granted = self.locks.leave(gone)
        assert granted == sorted(granted)
        assert not self.told.intersection(granted), "nobody is told twice"
        self.told.update(granted)

    @invariant()
    def held_is_what_waits_for_nobody_before_it(self) -> None:
        waiting = {
            later
            for earlier, later in combinations(sorted(self.claims), 2)
            if conflict(self.claims[earlier], self.claims[later])
        }
        assert set(self.locks.holders) == self.claims.keys() - waiting == self.told
        assert self.locks.waiting == tuple(sorted(waiting))


TestLocksAgainstTheirRules = LocksAgainstTheirRules.TestCase
