"""Sockets leave descriptors for files, and the want of them is told once."""

import errno
import os
import resource

import pytest

from zeolith.server.descriptors import KEPT, Watch, connections_possible


@pytest.fixture
def limit(monkeypatch) -> dict[str, int]:
    """The limits of this process, which are only said to be so."""
    state = {"soft": 1024, "hard": 4096}

    def setrlimit(_which: int, limits: tuple[int, int]) -> None:
        soft, hard = limits
        assert hard == state["hard"]
        assert hard == resource.RLIM_INFINITY or soft <= hard
        state["soft"] = soft

    monkeypatch.setattr(
        resource, "getrlimit", lambda _which: (state["soft"], state["hard"])
    )
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    return state


def test_the_limit_is_raised_to_what_is_needed_and_not_beyond(limit, caplog):
    assert connections_possible(1500) == 1500
    assert limit["soft"] == 2000 + KEPT
    assert not caplog.records


def test_a_limit_that_is_high_enough_is_left_alone(limit):
    assert connections_possible(300) == 300
    assert limit["soft"] == 1024


def test_where_there_are_not_as_many_fewer_may_connect_and_it_is_told(limit, caplog):
    assert connections_possible(10_000) == (4096 - KEPT) * 3 // 4
    assert limit["soft"] == 4096
    assert "only 3024 connections are possible, not 10000" in caplog.text


@pytest.mark.parametrize("soft", [1024, resource.RLIM_INFINITY])
def test_no_limit_is_no_limit(limit, soft):
    limit.update(soft=soft, hard=resource.RLIM_INFINITY)
    assert connections_possible(1_000_000) == 1_000_000


def test_a_limit_that_cannot_be_raised_is_heeded(limit, monkeypatch):
    def refuse(*_args: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert connections_possible(10_000) == (1024 - KEPT) * 3 // 4


def test_the_want_of_descriptors_is_told_once(monkeypatch, caplog):
    watch = Watch()
    watch.tick()
    with monkeypatch.context() as patched:

        def dup(_descriptor: int) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        patched.setattr(os, "dup", dup)
        for _ in range(3):
            watch.tick()
    for _ in range(3):
        watch.tick()
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "no file descriptors left (Too many open files)" in caplog.text
    assert "again" in caplog.text
