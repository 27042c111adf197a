"""A pack as others see it, and stop it."""

import pytest

from zeolith.storage.pack_progress import PackCancelled, Packing


class Process:
    killed = 0

    def kill(self) -> None:
        self.killed += 1


def test_it_says_who_and_how_far():
    packing = Packing("10.0.0.1:5000 (cron)")
    packing.phase, packing.fraction = "copying", 0.123456
    packing.bytes, packing.bytes_total = 5, 40
    described = packing.describe()
    assert described.pop("started") <= packing.started
    assert described == {
        "phase": "copying",
        "fraction": 0.1235,
        "bytes": 5,
        "bytes_total": 40,
        "who": "10.0.0.1:5000 (cron)",
    }


def test_cancelling_ends_the_process_and_the_pack():
    packing, process = Packing(), Process()
    packing.begins(process)
    packing.refuse_if_cancelled()
    assert packing.cancel("nobody wants it")
    assert packing.cancel("nor somebody else")
    assert process.killed == 2
    with pytest.raises(PackCancelled, match="nobody wants it"):
        packing.is_past_cancelling()


def test_what_was_cancelled_before_its_process_began_ends_it_at_once():
    packing, process = Packing(), Process()
    assert packing.cancel("too early")
    packing.begins(process)
    assert process.killed == 1


def test_past_the_swap_it_is_too_late():
    packing, process = Packing(), Process()
    packing.begins(process)
    packing.is_past_cancelling()
    assert not packing.cancel("too late")
    assert process.killed == 0
    packing.refuse_if_cancelled()
