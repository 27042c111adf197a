"""A pack is asked for once, and waited for or not."""

import logging
import threading

import pytest
from ZODB.FileStorage.FileStorage import FileStorageError

from zeolith.client.errors import ClientDisconnected
from zeolith.client.packing import begin_pack, pack
from zeolith.client.storage import ClientStorage

from ..support.script import Act, Held, ScriptedServer
from ..support.waiting import wait_until


@pytest.fixture
def storage(server: ScriptedServer):
    storage = ClientStorage(server.address, wait_timeout=5)
    yield storage
    storage.close()


def session_of(storage):
    session = storage.current_session
    assert session is not None
    return session


def test_a_pack_returns_when_it_is_done(server, storage):
    may_end = threading.Event()
    server.answers["pack"] = Held(may_end, [True, 2, 1])
    packing = threading.Thread(target=pack, args=(session_of(storage), 5.0, True))
    packing.start()
    wait_until(lambda: server.asked("pack"), "the request")
    assert packing.is_alive()
    may_end.set()
    packing.join()
    assert list(map(tuple, server.asked("pack"))) == [(5.0, True)]


def test_a_pack_that_is_begun_is_not_waited_for_and_its_end_is_logged(
    server, storage, caplog
):
    caplog.set_level(logging.INFO)
    may_end = threading.Event()
    server.answers["pack"] = Held(may_end, [True, 2, 1])
    begin_pack(session_of(storage), 5.0, None)
    wait_until(lambda: server.asked("pack"), "the request")
    # Other calls go on.
    storage.ping()
    may_end.set()
    wait_until(lambda: "the pack is done" in caplog.text, "its end")


def test_the_failure_of_a_pack_that_nobody_waits_for_is_logged(server, storage, caplog):
    server.answers["pack"] = FileStorageError("another pack")
    begin_pack(session_of(storage), 5.0, None)
    wait_until(lambda: "was not done: another pack" in caplog.text, "the error")


@pytest.mark.parametrize("step", [pack, begin_pack])
def test_a_pack_without_a_connection_says_so(server, storage, step):
    session = session_of(storage)
    session.close("the server is gone")
    with pytest.raises(ClientDisconnected, match="the server is gone"):
        step(session, 5.0, None)


def test_an_end_that_is_lost_is_logged(server, storage, caplog):
    caplog.set_level(logging.INFO)
    server.answers["pack"] = Act.HANG_UP
    begin_pack(session_of(storage), 5.0, None)
    wait_until(lambda: "is not known" in caplog.text, "the loss")
