"""A server comes back with an older copy of its data, or with other data."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.storage.adapted import TIDS_SKIPPED
from zeolith.storage.filestore import FileStore
from zeolith.storage.tids import advanced, tid_at

from ..support.gates import Gate
from ..support.inprocess import InProcessServer, client_of
from ..support.records import Listening, begin, commit, oid_of, seen, wait_for_position
from ..support.waiting import wait_until

X = oid_of("x")


class Backup:
    """A server whose data can be put away and put back."""

    def __init__(self, folder: Path):
        self._data = folder / "data"
        self._copy = folder / "copy"
        self._data.mkdir()
        self.server = InProcessServer(
            {"1": lambda: FileStore("1", str(self._data / "Data.fs"))}
        )

    def put_away(self) -> None:
        """Keep a copy of what is there now."""
        self.server.stop()
        shutil.copytree(self._data, self._copy)
        self.server.start()

    def put_back(self) -> None:
        """Go on with the copy."""
        self.server.stop()
        shutil.rmtree(self._data)
        self._copy.rename(self._data)
        self.server.start()

    def replace(self) -> None:
        """Go on with another database."""
        self.server.stop()
        shutil.rmtree(self._data)
        self._data.mkdir()
        self.server.start()


@pytest.fixture
def backup(tmp_path: Path) -> Iterator[Backup]:
    backup = Backup(tmp_path)
    with backup.server:
        yield backup


@pytest.fixture
def server(backup: Backup) -> InProcessServer:
    return backup.server


@pytest.fixture
def cached(in_memory_and_on_disk: dict[str, Any]) -> dict[str, Any]:
    return in_memory_and_on_disk


@pytest.fixture
def storage(server: InProcessServer, cached: dict[str, Any]) -> Iterator[ClientStorage]:
    with client_of(server, **cached) as storage:
        yield storage


def wait_for_return(storage: ClientStorage, server: InProcessServer) -> None:
    wait_until(
        lambda: storage.is_connected() and server.status()["sessions"], "the return"
    )


def loads(server: InProcessServer) -> int:
    return int(server.on_loop(lambda: server.served.counters.loads))


def test_what_both_have_in_common_is_kept(backup, server, storage, caplog):
    """Only what came after the copy was made is forgotten, and that loudly."""
    common = commit(storage, x=b"x", y=b"old")
    assert (seen(storage, "x"), seen(storage, "y")) == (b"x", b"old")
    backup.put_away()
    wait_for_return(storage, server)
    for n in range(5):
        commit(storage, y=b"lost %d" % n, z=b"lost")
    assert seen(storage, "z") == b"lost"
    backup.put_back()
    wait_for_return(storage, server)
    assert storage.lastTransaction() == common
    before = loads(server)
    assert seen(storage, "x") == b"x"
    assert loads(server) == before
    assert seen(storage, "y") == b"old"
    assert loads(server) == before + 1
    with pytest.raises(KeyError):
        seen(storage, "z")
    [critical] = [each for each in caplog.records if each.levelname == "CRITICAL"]
    assert common.hex() in critical.message


def test_a_restored_server_that_has_gone_on_is_found_out_too(
    backup, server, storage, caplog
):
    """Its last tid is later than ours by now; our last one was never in it."""
    common = commit(storage, x=b"x", y=b"old")
    # From here on tids are given by the clock, not because of what a start skips.
    skipped = advanced(common, 2 * TIDS_SKIPPED)
    wait_until(lambda: tid_at(time.time()) > skipped, "a later tid")
    assert seen(storage, "x") == b"x"
    backup.put_away()
    wait_for_return(storage, server)
    commit(storage, y=b"lost")
    assert seen(storage, "y") == b"lost"
    # It does not come back before others have written.
    gate = Gate()
    gate.shut()
    storage._connector._dial = gate.before(storage._connector._dial)
    backup.put_back()
    gate.wait_until_reached()
    with client_of(server) as writer:
        tids = [commit(writer, y=b"of others %d" % n) for n in range(3)]
    gate.open()
    wait_until(storage.is_connected, "the return")
    assert storage.lastTransaction() == tids[-1]
    before = loads(server)
    assert seen(storage, "x") == b"x"
    assert loads(server) == before
    assert seen(storage, "y") == b"of others 2"
    assert "restored from an older copy" in caplog.text
    info = storage.connection_info()
    assert info is not None
    assert info["changes_replayed"] == 3


def test_a_client_that_is_ahead_of_the_server_goes_back(
    backup, server, storage, caplog
):
    """It must neither refuse the server for ever nor believe what it remembers."""
    database = Listening()
    storage.registerDB(database)
    old = commit(storage, x=b"old")
    backup.put_away()
    wait_for_return(storage, server)
    with client_of(server) as writer:
        lost = [commit(writer, x=b"lost %d" % n) for n in range(3)]
        wait_for_position(storage, lost[-1])
        assert seen(storage, "x") == b"lost 2"
    backup.put_back()
    wait_for_return(storage, server)
    assert database.afresh == 1
    assert storage.lastTransaction() == old
    assert storage.load(X) == (b"old", old)
    assert seen(storage, "x") == b"old"
    assert "restored from an older copy" in caplog.text


def test_a_tid_that_a_client_has_seen_is_not_used_for_something_else(
    backup, server, storage
):
    """What is committed after the restore comes after everything that was lost."""
    commit(storage, x=b"old")
    backup.put_away()
    wait_for_return(storage, server)
    lost = commit(storage, x=b"lost")
    backup.put_back()
    wait_for_return(storage, server)
    new = commit(storage, x=b"new")
    assert new > lost
    assert storage.load(X) == (b"new", new)
    assert seen(storage, "x") == b"new"
    with client_of(server) as newcomer:
        assert newcomer.load(X) == (b"new", new)


def test_a_clock_that_was_set_back_gives_no_tid_twice(
    backup, server, storage, monkeypatch
):
    """The restored server's clock is behind the tids that its clients have seen."""
    commit(storage, x=b"old")
    backup.put_away()
    wait_for_return(storage, server)
    lost = [commit(storage, x=b"lost") for _ in range(3)]
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    backup.put_back()
    wait_for_return(storage, server)
    assert commit(storage, x=b"new") > lost[-1]


def test_what_others_write_after_a_restore_is_seen(backup, server, storage):
    """The client, which remembers later tids, is not stuck in its own future."""
    commit(storage, x=b"old")
    backup.put_away()
    wait_for_return(storage, server)
    commit(storage, x=b"lost")
    backup.put_back()
    wait_for_return(storage, server)
    with client_of(server) as writer:
        for n in range(3):
            tid = commit(writer, x=b"%d" % n)
            wait_for_position(storage, tid)
            assert seen(storage, "x") == b"%d" % n


def test_another_database_at_the_same_address_is_another_database(
    backup, server, storage
):
    """Its tids may even be later; nothing of what is remembered is true of it."""
    database = Listening()
    storage.registerDB(database)
    commit(storage, x=b"of the first")
    backup.replace()
    wait_for_return(storage, server)
    assert database.afresh == 1
    with client_of(server) as writer:
        tid = commit(writer, y=b"of the second")
        wait_for_position(storage, tid)
    assert seen(storage, "y") == b"of the second"
    with pytest.raises(KeyError):
        storage.load(X)


def test_a_transaction_does_not_continue_in_a_restored_database(
    backup, server, storage
):
    commit(storage, x=b"old")
    backup.put_away()
    wait_for_return(storage, server)
    transaction = begin(storage, x=b"never")
    begun = storage.current_session
    backup.put_back()
    wait_until(
        lambda: storage.is_connected() and storage.current_session is not begun,
        "another session",
    )
    with pytest.raises(ClientDisconnected, match="nothing of it was committed"):
        storage.tpc_vote(transaction)
    assert storage.load(X)[0] == b"old"
