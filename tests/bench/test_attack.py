"""What is pure in the measuring of attacks, and the attackers' words."""

import pytest

from zeolith.protocol.codec import decode
from zeolith.protocol.frames import FrameReader
from zeolith.protocol.messages import Request
from zeolith.protocol.methods import METHODS

from . import attack, attackers
from .attack import Found, Sample


def samples(*took_us: float, call: str = "load") -> list[Sample]:
    return [Sample(float(at), took / 1e6, call) for at, took in enumerate(took_us)]


def test_a_ratio_is_that_of_a_round_and_the_median_of_the_rounds():
    found = Found()
    for quiet, under in ((10, 20), (100, 100), (10, 50)):
        found.rounds.append((samples(quiet, quiet), samples(under, under)))

    without, with_it, ratio = attack.compared(found, "load", 50)

    assert (without, with_it, ratio) == pytest.approx((10, 50, 2))


def test_a_call_that_took_all_the_time_counts_and_none_at_all_is_endless():
    long = Sample(0.0, 10.0, "load")

    assert attack.within([long, *samples(1, 1)], 4.0, 5.0) == [long]
    assert attack.quantile_us([long], "load", 50) == 10e6
    assert attack.quantile_us([long], "commit", 50) == float("inf")


def test_the_attacker_has_a_core_of_its_own_if_there_are_two():
    assert attack.cores_of([3, 1, 2]) == ({1, 2}, {3})
    assert attack.cores_of([1]) == ({1}, {1})


def test_the_table_has_a_line_for_each_attack():
    found = Found([(samples(10, 10), samples(20, 20))], [5.0], [60.0])
    chosen = attackers.ATTACKS[0]

    lines = attack.table([chosen], {chosen.key: found}).splitlines()

    assert len(lines) == 3
    assert "10 -> 20 (2.0)" in lines[2]


def test_requests_are_what_the_codec_makes_of_them():
    frames = FrameReader(2**31).feed(attackers.requests(7, 2, "ping", []))

    assert list(map(decode, frames)) == [
        Request(7, "ping", []),
        Request(8, "ping", []),
    ]


def test_there_is_an_argument_of_each_kind_for_each_method():
    for method in METHODS.values():
        if method.sender == "client":
            oid = bytes(8)
            method.check(
                [attackers.ARGUMENTS[kind.name](oid) for _, kind in method.arguments]
            )
