"""The log says what somebody does, and not ten thousand times."""

import pytest

from zeolith.server.complaints import SOURCES_MAX, Complaints


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


def said(caplog) -> list[str]:
    texts = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return texts


def test_a_source_is_complained_about_once_a_second(complaints, caplog):
    for hundredth in range(250):
        complaints.say("192.0.2.7", 100 + hundredth / 100, "too much")
    assert said(caplog) == [
        "too much",
        "too much (99 more like it)",
        "too much (99 more like it)",
    ]


def test_sources_do_not_silence_each_other(complaints, caplog):
    complaints.say("192.0.2.7", 100, "one")
    complaints.say("192.0.2.8", 100, "other")
    assert said(caplog) == ["one", "other"]


def test_thousands_of_sources_are_not_thousands_of_lines(complaints, caplog):
    for n in range(10_000):
        complaints.say(f"source {n}", 100, "too much")
    assert len(said(caplog)) == SOURCES_MAX
    assert len(complaints._said_at) == SOURCES_MAX
    assert not complaints._unsaid
    complaints.say("somebody else", 101, "and later")
    assert said(caplog) == ["and later"]
    assert len(complaints._said_at) == 1
