"""The bounds of the wire."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from zeolith.protocol.codec import encode
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import Request

UNITS = ("_bytes_max", "_max", "_s")


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_every_limit_has_its_unit_in_its_name_and_is_positive(name):
    assert name.endswith(UNITS)
    assert getattr(DEFAULT, name) > 0


def test_nobody_can_change_the_limits_of_all():
    with pytest.raises(FrozenInstanceError):
        DEFAULT.frame_bytes_max = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "contradiction",
    [
        {"hello_frame_bytes_max": 2000, "frame_bytes_max": 1000},
        {"frame_bytes_max": 2**32},
        {"batch_bytes_max": 2000, "frame_bytes_max": 1000, "hello_frame_bytes_max": 1},
        {"heartbeat_interval_s": 10, "heartbeat_timeout_s": 29},
    ],
)
def test_limits_that_contradict_each_other_are_refused(contradiction):
    with pytest.raises(AssertionError):
        replace(DEFAULT, **contradiction)


def test_nothing_much_is_kept_of_a_peer_that_did_not_say_hello():
    assert DEFAULT.hello_frame_bytes_max <= 64 * 1024


def test_the_largest_record_fits_into_a_frame_with_the_longest_metadata():
    limits = Limits(frame_bytes_max=2**20, batch_bytes_max=2**20)
    text = b"x" * 65_535
    data = b"x" * limits.record_bytes_max
    operation = ["store", bytes(8), bytes(8), data]
    metadata = [text, text, text, bytes(8), " "]
    vote = Request(2**63, "vote", [bytes(16), metadata, [operation]])
    assert len(encode(vote)) <= limits.frame_bytes_max
