"""Entries of the log become ZODB's descriptions; the paging never loses one."""

import pickle
import sys

import pytest
from ZODB import _compat
from ZopeUndo.Prefix import Prefix

from zeolith.client import log


def tid(number: int) -> bytes:
    return number.to_bytes(8, "big")


def entry(number: int, **extension: object) -> list[object]:
    packed = pickle.dumps(extension, 3) if extension else b""
    return [tid(number), b"/folder user", b"what", packed, 77]


class FakeServer:
    """Answers undo_log from a list of entries, newest first."""

    def __init__(self, count: int):
        self.entries = [entry(number) for number in range(count, 0, -1)]
        self.calls = 0

    def call(self, method, before, size):
        assert method == "undo_log"
        self.calls += 1
        older = [e for e in self.entries if before is None or e[0] < before]
        return older[:size]


def test_the_extension_stands_beside_the_rest():
    described = log.describe(entry(1, colour="red"))
    assert described["colour"] == "red"
    assert described["user_name"] == b"/folder user"
    assert described["size"] == 77


def test_an_unreadable_extension_hides_nothing_else(caplog):
    described = log.describe([tid(1), b"u", b"d", b"no pickle", 1])
    assert described["description"] == b"d"
    assert "unreadable" in caplog.text


@pytest.mark.parametrize("count", [0, 1, log.BATCH - 1, log.BATCH, 2 * log.BATCH + 1])
def test_all_pages_are_read(count):
    server = FakeServer(count)
    assert len(list(log.undoable(server.call))) == count


def test_no_more_pages_are_read_than_wanted():
    server = FakeServer(5 * log.BATCH)
    assert len(log.between(log.undoable(server.call), 0, -20, None)) == 20
    assert server.calls == 1


def test_first_and_last_count_what_the_filter_lets_pass():
    numbered = [{"n": n} for n in range(10)]
    found = log.between(numbered, 1, 3, lambda d: d["n"] % 2 == 1)
    assert found == [{"n": 3}, {"n": 5}]
    assert log.between(numbered, 2, -3, None) == [{"n": 2}, {"n": 3}, {"n": 4}]


def test_a_prefix_is_compared_from_the_left():
    described = log.describe(entry(1))
    assert log.having({"user_name": Prefix("/folder")})(described)
    assert not log.having({"user_name": Prefix("/other")})(described)
    assert not log.having({"no such key": 1})(described)


def test_what_is_not_plain_is_left_out_and_not_imported(caplog):
    extension = b"}(U\x01acthis\ns\nu."
    described = log.describe([tid(1), b"user", b"description", extension, 7])
    assert described["description"] == b"description"
    assert "a" not in described
    assert "this.s" in caplog.text
    assert "this" not in sys.modules


def test_where_unpickling_is_forbidden_nothing_is_unpickled(monkeypatch):
    """A server that has a client in it forbids it for its process."""
    monkeypatch.setattr(_compat, "loads", lambda extension: {"bytes": extension})
    told = [tid(1), b"user", b"description", b"whatever", 7]
    assert log.describe(told)["bytes"] == b"whatever"
