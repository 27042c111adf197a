"""Clients whose server does not let them do what they would like to do."""

import logging
import threading
from contextlib import closing

import pytest
import transaction
import ZODB
from persistent.mapping import PersistentMapping
from ZODB.POSException import ReadOnlyError, Unsupported
from ZODB.utils import p64

from zeolith.client import connector
from zeolith.client.connector import Connector
from zeolith.client.dial import LOCKED_OUT_S
from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.protocol.errors import Forbidden, WriteForbidden
from zeolith.server.access import Access, parse_grants

from ..support.identities import PASSWORD, TOKEN
from ..support.identities import access as access_of
from ..support.inprocess import client_of, serving
from ..support.waiting import wait_until


def access(anonymous: str) -> Access:
    return Access(anonymous=parse_grants(anonymous))


def renew(server, anonymous):
    server.on_loop(server.service.greeting.renew, access(anonymous))


@pytest.fixture
def path(tmp_path):
    """A Data.fs with a root object."""
    path = tmp_path / "Data.fs"
    database = ZODB.DB(str(path))
    with database.transaction() as connection:
        connection.root()["bank"] = PersistentMapping()
    database.close()
    return path


def test_a_reader_is_read_only_without_having_asked(path):
    with serving(path, access=access("read")) as server, client_of(server) as storage:
        assert storage.isReadOnly()
        database = ZODB.DB(storage)
        connection = database.open()
        assert "bank" in connection.root()
        connection.root()["mine"] = 1
        with pytest.raises(ReadOnlyError):
            transaction.commit()
        transaction.abort()
        connection.close()
        for method, *args in (
            ("pack", 0.0, None),
            ("new_oids", 1),
            ("vote", b"t" * 16, [b"", b"", b"", None, " "], []),
        ):
            with pytest.raises(WriteForbidden):
                storage.call(method, *args)
        with pytest.raises(Forbidden, match="needs the role admin"):
            storage.server_status()
        assert server.served.changes.last_tid == storage.lastTransaction()


def test_a_reader_does_not_look_for_a_better_server(path):
    with (
        serving(path, access=access("read")) as server,
        client_of(server, read_only_fallback=True) as storage,
    ):
        assert storage.isReadOnly()
        storage.ping()
        assert server.status()["sessions"] == 1
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.endswith("-upgrade")]


def test_a_writer_that_may_not_undo_is_refused_whatever_it_sends(path):
    with serving(path, access=access("write")) as server, client_of(server) as storage:
        assert not storage.supportsUndo()
        tid = storage.lastTransaction()
        with pytest.raises(Unsupported):
            storage.undo(b"AAAAAAAAAAA=", None)
        metadata = [b"", b"", b"", None, " "]
        with pytest.raises(Forbidden, match="needs the role undo"):
            storage.call("vote", b"t" * 16, metadata, [["undo", tid]])
        session = storage.current_session
        assert session is not None
        channel = session.borrow()
        notice = channel._connection.notice(
            "stage", [b"t" * 16, [["undo", tid]]], channel.used_at
        )
        channel.send(notice)
        with pytest.raises(Forbidden, match="needs the role undo"):
            channel.call("vote", b"t" * 16, metadata, [])
        session.give_back(channel)
        with pytest.raises(Forbidden, match="needs the role pack"):
            storage.pack()
        assert server.served.changes.last_tid == tid


def test_who_has_no_role_is_told_so_at_once(path):
    with (
        serving(path, access=access("none")) as server,
        pytest.raises(ClientDisconnected, match="has no role on storage '1'"),
        client_of(server),
    ):
        raise AssertionError("it came in")


def test_a_client_that_loses_its_role_to_write_goes_on_reading(path, caplog):
    with serving(path, access=access("undo")) as server, client_of(server) as storage:
        assert storage.supportsUndo()
        assert not storage.isReadOnly()
        with caplog.at_level(logging.WARNING, logger="zeolith.client"):
            renew(server, "read")
            wait_until(storage.isReadOnly, "a session that reads")
        assert "the roles of anonymous have changed" in caplog.text
        assert storage.load(p64(0))
        renew(server, "write")
        wait_until(
            lambda: storage.is_connected() and not storage.isReadOnly(),
            "a session that writes",
        )


def test_who_is_not_let_in_does_not_knock_all_the_time(path, monkeypatch):
    pauses = []
    pause = Connector._pause

    def note(self, delay_s):
        pauses.append(delay_s)
        pause(self, delay_s)

    monkeypatch.setattr(Connector, "_pause", note)
    with serving(path, access=access_of(ann="write")) as server:
        server.service.greeting.failed_login_delay_s = 0.0
        storage = ClientStorage(
            server.address, username="ann", password="guessed", wait=False
        )
        with closing(storage), pytest.raises(ClientDisconnected, match="login failed"):
            storage.ping()
        assert pauses == [LOCKED_OUT_S]


def test_a_client_whose_password_was_put_right_comes_in(path, tmp_path, monkeypatch):
    monkeypatch.setattr(connector, "LOCKED_OUT_S", 0.01)
    secret = tmp_path / "password"
    secret.write_text("mistyped")
    with serving(path, access=access_of(ann="write")) as server:
        server.service.greeting.failed_login_delay_s = 0.0
        storage = ClientStorage(
            server.address, username="ann", password_file=str(secret), wait=False
        )
        with closing(storage):
            with pytest.raises(ClientDisconnected, match="login failed"):
                storage.ping()
            secret.write_text(PASSWORD)
            wait_until(storage.is_connected, "the login")
            # And again, by itself, after a lost connection.
            session = storage.current_session
            server.cut_off()
            wait_until(
                lambda: storage.current_session not in (None, session), "the next one"
            )
            storage.ping()


def test_no_secret_is_in_a_log_a_repr_or_an_error(path, tmp_path, caplog):
    (tmp_path / "token").write_text(TOKEN)
    known = access_of(ann="write")
    with caplog.at_level(logging.DEBUG), serving(path, access=known) as server:
        server.service.greeting.failed_login_delay_s = 0.0
        for options in (
            {"username": "ann", "password": PASSWORD},
            {"token_file": str(tmp_path / "token")},
        ):
            with client_of(server, **options) as storage:
                storage.ping()
                shown = f"{storage!r} {storage.connection_info()}"
                shown += repr(vars(storage)) + repr(vars(storage._connector))
                assert PASSWORD not in shown
                assert TOKEN not in shown
        with pytest.raises(ClientDisconnected) as raised:
            client_of(server, username="bob", password=PASSWORD).__enter__()
    assert PASSWORD not in str(raised.value)
    assert PASSWORD not in caplog.text
    assert TOKEN not in caplog.text
