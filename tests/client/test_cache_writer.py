"""The thread of a cache: what is due together is written together."""

import threading

import pytest

from zeolith.client import cache_writer
from zeolith.client.cache_writer import Writer

from ..support.waiting import wait_until


class Flushes:
    """A flush that counts, and succeeds or not."""

    def __init__(self) -> None:
        self.count = 0
        self.succeeds = True

    def __call__(self) -> bool:
        self.count += 1
        return self.succeeds


@pytest.fixture
def flushes() -> Flushes:
    return Flushes()


def test_there_is_no_thread_before_it_is_needed(flushes):
    before = threading.active_count()
    writer = Writer(flushes)
    assert threading.active_count() == before
    assert writer.close()
    assert flushes.count == 1, "what waits is written at the end"


def test_what_is_due_is_flushed_once_for_many(flushes, monkeypatch):
    monkeypatch.setattr(cache_writer, "FLUSH_WAIT_S", 0.01)
    writer = Writer(flushes)
    for _ in range(100):
        writer.due()
    wait_until(lambda: flushes.count, "a flush")
    writer.due()
    wait_until(lambda: flushes.count == 2, "another flush")
    assert writer.close()


def test_what_is_no_hurry_goes_with_what_is(flushes, monkeypatch):
    monkeypatch.setattr(cache_writer, "LATER_WAIT_S", 1000)
    writer = Writer(flushes)
    writer.due(is_urgent=False)
    assert writer.have_done(lambda: flushes.count) == 0
    writer.due()
    wait_until(lambda: flushes.count, "a flush")
    monkeypatch.setattr(cache_writer, "LATER_WAIT_S", 0)
    writer.due(is_urgent=False)
    wait_until(lambda: flushes.count == 2, "another flush")
    assert writer.close()
    assert flushes.count == 3


def test_what_failed_is_tried_again(flushes, monkeypatch):
    monkeypatch.setattr(cache_writer, "FLUSH_WAIT_S", 0.0)
    monkeypatch.setattr(cache_writer, "RETRY_WAIT_S", 0.01)
    flushes.succeeds = False
    writer = Writer(flushes)
    writer.due()
    wait_until(lambda: flushes.count >= 3, "several tries")
    flushes.succeeds = True
    writer.close()


def test_a_job_is_done_in_the_thread_and_its_outcome_returned(flushes):
    writer = Writer(flushes)
    assert writer.have_done(lambda: threading.current_thread().name) == "zeolith-cache"
    with pytest.raises(ValueError, match="nonsense"):
        writer.have_done(lambda: int("nonsense"))
    assert writer.close()


def test_nobody_waits_for_ever_for_a_thread_that_does(flushes, monkeypatch):
    monkeypatch.setattr(cache_writer, "WAIT_S", 0.01)
    may_go_on = threading.Event()
    writer = Writer(flushes)
    with pytest.raises(TimeoutError, match="another process"):
        writer.have_done(may_go_on.wait)
    assert not writer.close()
    may_go_on.set()
    assert writer._thread is not None
    writer._thread.join(30)
    assert not writer._thread.is_alive()


def test_after_the_end_nothing_is_due_or_done(flushes):
    writer = Writer(flushes)
    writer.close()
    writer.due()
    with pytest.raises(TimeoutError, match="closed"):
        writer.have_done(flushes)
    assert flushes.count == 1
