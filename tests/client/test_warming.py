"""Fetching what was used most: in order, once for a host, and not all at once."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from persistent.mapping import PersistentMapping
from ZODB.DB import DB
from ZODB.utils import p64

from zeolith.client import warming
from zeolith.client.cache_place import CachePlace
from zeolith.client.storage import ClientStorage
from zeolith.client.warming import SAMPLE, Heat, WarmUp, read

from ..support.serving import ServerProcess
from ..support.waiting import wait_until

A, B, C = map(p64, (1, 2, 3))


def used(heat: Heat, oid: bytes, times: int) -> None:
    for _ in range(times * SAMPLE):
        heat.note(oid)


# The list


def test_what_was_used_most_comes_first(tmp_path):
    heat = Heat()
    used(heat, A, 2)
    used(heat, B, 5)
    heat.save(tmp_path / "hot")
    assert list(read(tmp_path / "hot")) == [B, A]


def test_what_was_used_long_ago_fades(tmp_path):
    heat = Heat()
    used(heat, A, 5)
    heat.save(tmp_path / "hot")
    for _ in range(10):
        used(heat, B, 1)
        heat.save(tmp_path / "hot")
    assert list(read(tmp_path / "hot")) == [B, A]


def test_processes_add_to_one_list_and_it_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(warming, "OIDS_MAX", 2)
    for oid, times in ((A, 2), (B, 3), (C, 1)):
        heat = Heat()
        used(heat, oid, times)
        heat.save(tmp_path / "hot")
    assert list(read(tmp_path / "hot")) == [B, A]


def test_nothing_used_is_nothing_written(tmp_path):
    Heat().save(tmp_path / "hot")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "[1]", "{", '{"x": 1}', '{"00": 1}', '{"0000000000000001": "a"}']
)
def test_a_list_that_is_damaged_is_empty(tmp_path, text):
    (tmp_path / "hot").write_text(text)
    assert read(tmp_path / "hot") == {}


# When and how


class Loads:
    """Loads nothing, and writes down what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[bytes]] = []
        self.cached = self.looks = 0
        self.error: Exception | None = None

    def __call__(self, oids: Sequence[bytes]) -> None:
        self.asked.append(list(oids))
        if self.error is not None:
            raise self.error

    def count(self) -> int:
        """What is in the cache."""
        self.looks += 1
        return self.cached


@pytest.fixture
def loads(monkeypatch) -> Loads:
    monkeypatch.setattr(warming, "JITTER_S", 0.0)
    monkeypatch.setattr(warming, "REQUEST_OIDS", 2)
    return Loads()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a list of A, B and C."""
    heat = Heat()
    for times, oid in enumerate((C, B, A), 1):
        used(heat, oid, times)
    heat.save(tmp_path / "hot")
    return tmp_path / "hot"


@pytest.fixture
def warm_up(loads: Loads) -> Iterator[WarmUp]:
    warm_up = WarmUp(loads, loads.count)
    yield warm_up
    warm_up.close()


def test_an_empty_cache_gets_what_was_used_most_in_small_requests(warm_up, loads, path):
    warm_up.session_began(path)
    wait_until(lambda: len(loads.asked) == 2, "the loads")
    assert loads.asked == [[A, B], [C]]


def test_a_cache_with_something_in_it_is_left_alone(warm_up, loads, path):
    loads.cached = 1
    warm_up.session_began(path)
    warm_up.close()
    assert loads.asked == []


def test_each_new_session_is_looked_at(warm_up, loads, path):
    loads.cached = 1
    warm_up.session_began(path)
    wait_until(lambda: loads.looks, "the first look")
    loads.cached = 0
    warm_up.session_began(path)
    wait_until(lambda: len(loads.asked) == 2, "the loads")


def test_one_process_of_a_host_does_it(loads, path, monkeypatch):
    may_go_on, has_begun = threading.Event(), threading.Event()

    def wait(_oids: Sequence[bytes]) -> None:
        has_begun.set()
        may_go_on.wait(30)

    first, second = WarmUp(wait, lambda: 0), WarmUp(loads, lambda: 0)
    first.session_began(path)
    assert has_begun.wait(30)
    second.session_began(path)
    second.close()
    assert loads.asked == []
    may_go_on.set()
    first.close()


def test_chance_decides_when_and_who_closes_need_not_wait(loads, path, monkeypatch):
    monkeypatch.setattr(warming, "JITTER_S", 10_000.0)
    warm_up = WarmUp(loads, lambda: 0)
    warm_up.session_began(path)
    warm_up.close()
    assert loads.asked == []


def test_an_error_ends_it_and_nothing_else(warm_up, loads, path):
    loads.error = ConnectionError("away")
    warm_up.session_began(path)
    wait_until(lambda: loads.asked, "the try")
    loads.error = None
    warm_up.session_began(path)
    wait_until(lambda: len(loads.asked) == 3, "the loads")


def test_what_was_used_is_saved_at_the_end(loads, tmp_path):
    warm_up = WarmUp(loads, lambda: 0)
    used(warm_up.heat, B, 1)
    warm_up.session_began(tmp_path / "hot")
    warm_up.close()
    assert list(read(tmp_path / "hot")) == [B]


def test_a_list_that_cannot_be_saved_is_said(loads, tmp_path, caplog):
    warm_up = WarmUp(loads, lambda: 0)
    used(warm_up.heat, B, 1)
    warm_up.session_began(tmp_path / "absent" / "hot")
    warm_up.close()
    assert "is not saved" in caplog.text


# In a storage


def test_it_needs_a_cache_that_lasts():
    with pytest.raises(ValueError, match="give cache, too"):
        ClientStorage(8100, warm_up=True, wait=False)


def test_after_a_full_drop_what_was_used_most_is_there_again(tmp_path, monkeypatch):
    monkeypatch.setattr(warming, "JITTER_S", 0.0)
    monkeypatch.setattr(warming, "SAMPLE", 1)
    place = CachePlace(tmp_path / "cache")
    with ServerProcess(tmp_path) as server:

        def opened() -> ClientStorage:
            return ClientStorage(
                server.address, cache=str(place.directory), warm_up=True
            )

        storage = opened()
        db = DB(storage)
        with db.transaction() as connection:
            for name in "abc":
                connection.root()[name] = PersistentMapping()
        oids = [db.open().root()[name]._p_oid for name in "abc"]
        for oid in oids:
            storage.load(oid)
        before = p64(int.from_bytes(storage.lastTransaction()) + 1)
        for oid in oids:
            storage.loadBefore(oid, before)
        db.close()
        for _identity, path in place.files():
            path.unlink()
        storage = opened()
        wait_until(lambda: all(storage.cache.load(oid, before) for oid in oids), "them")
        storage.close()
