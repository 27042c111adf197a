"""How many may be there, and who has to go."""

from dataclasses import replace

import pytest

from zeolith.protocol.limits import DEFAULT
from zeolith.server.admission import Admission
from zeolith.server.origins import Origin

LIMITS = replace(
    DEFAULT,
    connections_max=8,
    address_connections_max=4,
    unwelcomed_connections_max=3,
)


class Somebody:
    """A peer that remembers what it was told."""

    def __init__(self, host: str = "192.0.2.7"):
        self.origin = Origin(f"{host}:4567", host)
        self.told: list[tuple[str, str]] = []

    def hang_up(self, reason: str, text: str = "") -> None:
        self.told.append((reason, text))


@pytest.fixture
def admission() -> Admission:
    return Admission(LIMITS)


def arrive(admission: Admission, *hosts: str) -> list[Somebody]:
    guests = [Somebody(host) for host in hosts]
    for guest in guests:
        admission.arrive(guest)
    return guests


def come(admission: Admission, *hosts: str) -> list[Somebody]:
    """Those who say hello at once."""
    guests = []
    for host in hosts:
        guests += arrive(admission, host)
        admission.welcome(guests[-1])
    return guests


async def test_as_many_as_allowed_stay(admission):
    guests = come(admission, *"aaaabbbb")
    assert not any(guest.told for guest in guests)


async def test_one_too_many_from_one_place_is_told_and_no_other(admission):
    guests = come(admission, *"aaaa")
    (late,) = arrive(admission, "a")
    ((reason, text),) = late.told
    assert reason == "limit"
    assert text == "more than 4 connections from a (address_connections_max)"
    (other,) = come(admission, "b")
    assert not any(guest.told for guest in [*guests, other])


async def test_who_leaves_makes_room(admission):
    first, *_others = come(admission, *"aaaa")
    admission.leave(first)
    assert not come(admission, "a")[0].told
    assert arrive(admission, "a")[0].told


async def test_one_too_many_of_all_is_told(admission):
    guests = come(admission, *"aabbccdd")
    (late,) = arrive(admission, "e")
    assert "more than 8 connections (connections_max)" in late.told[0][1]
    assert not any(guest.told for guest in guests)


async def test_who_has_not_said_hello_makes_room_for_who_comes(admission):
    guests = come(admission, *"aabbccd")
    silent, late = arrive(admission, "d", "e")
    assert "connections_max" in silent.told[0][1]
    assert not late.told
    assert not any(guest.told for guest in guests)


async def test_the_oldest_of_the_silent_goes_when_there_are_too_many(admission):
    silent = arrive(admission, *"abcd")
    assert [len(guest.told) for guest in silent] == [1, 0, 0, 0]
    assert "unwelcomed_connections_max" in silent[0].told[0][1]
    assert admission.unwelcomed == 3


async def test_thousands_of_the_silent_keep_out_nobody_who_says_hello(admission):
    guests, silent = list[Somebody](), list[Somebody]()
    for n in range(5000):
        silent += arrive(admission, f"silent {n}")
        if n % 1000 == 0:
            guests += come(admission, "a" if n < 4000 else "b")
        for gone in [each for each in silent if each.told]:
            silent.remove(gone)
            admission.leave(gone)
    assert len(guests) == 5
    assert not any(guest.told for guest in guests)


async def test_nothing_is_left_of_those_who_are_gone(admission):
    guests = [*come(admission, *"abcd"), *arrive(admission, *"aef")]
    for guest in guests:
        admission.leave(guest)
    assert admission.unwelcomed == 0
    assert not admission._sources
    assert not admission._count


async def test_a_flood_is_not_a_flood_in_the_log(admission, caplog):
    for _ in range(1000):
        arrive(admission, "192.0.2.7")
    assert len(caplog.records) == 1
    assert "192.0.2.7:4567 is disconnected: more than" in caplog.text
