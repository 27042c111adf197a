"""An answer is taken or dropped, and the channel is given back in every case."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from zeolith.client.asking import ask
from zeolith.client.errors import ChannelLost
from zeolith.client.storage import ClientStorage

from ..support.script import Act, ScriptedServer, oid, tid
from ..support.waiting import wait_until

A, T1 = oid(1), tid(1)


@pytest.fixture
def storage(server: ScriptedServer) -> Iterator[ClientStorage]:
    server.answers["load_serial"] = b"data"
    with closing(ClientStorage(server.address)) as storage:
        yield storage


def channels_of(storage: ClientStorage) -> Any:
    session = storage.current_session
    assert session is not None
    return session, session._pool


def test_an_answer_is_taken_later(server, storage):
    session, pool = channels_of(storage)
    asked = ask(session, "load_serial", A, T1)
    wait_until(lambda: server.asked("load_serial"), "the request")
    assert storage.loadSerial(A, T1) == b"data"
    assert len(pool.idle) == 1
    assert asked.answer() == b"data"
    assert len(pool.idle) == 2


def test_a_channel_whose_answer_nobody_takes_is_closed(storage):
    session, pool = channels_of(storage)
    ask(session, "load_serial", A, T1).drop()
    assert not pool.channels
    assert storage.loadSerial(A, T1) == b"data"


def test_an_answer_that_is_lost_is_an_error(server, storage):
    session, pool = channels_of(storage)
    server.answers["load_serial"] = Act.HANG_UP
    asked = ask(session, "load_serial", A, T1)
    with pytest.raises(ChannelLost):
        asked.answer()
    assert not pool.channels


def test_what_cannot_be_asked_is_an_error_and_leaves_nothing(storage):
    session, pool = channels_of(storage)
    with pytest.raises(TypeError):
        ask(session, "load_serial", A, object())
    assert not pool._lent


def test_a_session_that_has_ended_is_asked_nothing(storage):
    session, _pool = channels_of(storage)
    session.close("the end")
    with pytest.raises(ChannelLost, match="the end"):
        ask(session, "load_serial", A, T1)
