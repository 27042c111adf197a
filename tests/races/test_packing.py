"""Others work while a server packs: nothing is lost, and nothing is told wrongly."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import transaction
from BTrees.OOBTree import OOBTree
from ZODB import DB
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ReadConflictError

from zeolith.client.storage import ClientStorage
from zeolith.storage import packing
from zeolith.storage.packing import FilePack

from ..support.gates import Background, Gate
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

MEMBERS = 4
SOON_S = 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    with serving(tmp_path / "Data.fs") as server:
        yield server


def fill(storage: ClientStorage) -> None:
    """A counter for each member, and a history to be packed."""
    db = DB(storage)
    with db.transaction() as connection:
        for member in range(MEMBERS):
            connection.root()[member] = OOBTree({"count": 0})
    for number in range(20):
        with db.transaction() as connection:
            connection.root()["text"] = "x" * 1000 + str(number)
    db.close()


class Member(threading.Thread):
    """Counts in its own tree, and looks that everybody's counts only grow."""

    def __init__(self, server: InProcessServer, number: int, stop: threading.Event):
        super().__init__(daemon=True)
        self.server, self.number, self.stop = server, number, stop
        self.commits = 0
        self.error: BaseException | None = None

    def commits_more(self, number: int) -> None:
        """Return when it has made so many commits more."""
        enough = self.commits + number
        wait_until(lambda: self.commits >= enough or self.error, "commits")

    def run(self) -> None:
        try:
            with client_of(self.server) as storage:
                db = DB(storage)
                self._count(db)
                db.close()
        except BaseException as error:
            self.error = error

    def _count(self, db: DB) -> None:
        manager = transaction.TransactionManager()
        connection = db.open(manager)
        seen = [0] * MEMBERS
        while not self.stop.is_set():
            manager.begin()
            try:
                counts = [connection.root()[each]["count"] for each in range(MEMBERS)]
            except ReadConflictError:
                # What it had begun to read was packed away.
                continue
            assert all(now >= before for now, before in zip(counts, seen, strict=True))
            assert counts[self.number] == self.commits
            seen = counts
            connection.root()[self.number]["count"] = self.commits + 1
            manager.commit()
            self.commits += 1
        connection.close()


def test_many_clients_commit_while_packs_replace_the_file(
    server, tmp_path, monkeypatch
):
    """Every commit is there afterwards, and everybody has heard of it."""
    # Many rounds, so that the swap comes in the middle of everything.
    monkeypatch.setattr(packing, "CLOSE_BYTES", 0)
    stop = threading.Event()
    with client_of(server) as packer, client_of(server) as watcher:
        fill(packer)
        packer = ClientStorage(server.address)
        db = DB(watcher)
        members = [Member(server, number, stop) for number in range(MEMBERS)]
        for member in members:
            member.start()
        for _ in range(4):
            packer.pack(time.time() - SOON_S / 10)
            for member in members:
                member.commits_more(3)
        packer.pack()
        stop.set()
        for member in members:
            member.join(30)
            assert member.error is None
        counts = [member.commits for member in members]

        def heard_of_all() -> bool:
            with db.transaction() as connection:
                root = connection.root()
                return [root[each]["count"] for each in range(MEMBERS)] == counts

        wait_until(heard_of_all, "the last invalidation")
        db.close()
        packer.close()
    server.stop()
    storage = FileStorage(str(tmp_path / "Data.fs"))
    plain = DB(storage)
    with plain.transaction() as connection:
        root = connection.root()
        assert [root[each]["count"] for each in range(MEMBERS)] == counts
    plain.close()


def test_a_revision_that_is_being_read_and_packed_away_is_a_conflict(server):
    """As with a FileStorage: the transaction is to be repeated."""
    with client_of(server) as storage, client_of(server) as other:
        fill(storage)
        db = DB(ClientStorage(server.address))
        manager = transaction.TransactionManager()
        connection = db.open(manager)
        manager.begin()
        root = connection.root()
        assert root
        with DB(other).transaction() as writing:
            writing.root()[0]["count"] = 99
        with client_of(server) as packer:
            packer.pack(time.time() + SOON_S)
        with pytest.raises(ReadConflictError):
            assert root[0]["count"]
        manager.begin()
        assert root[0]["count"] == 99
        manager.abort()
        connection.close()
        db.close()


def test_a_load_in_the_middle_of_the_swap_reads_the_old_file_or_the_new(
    server, monkeypatch
):
    gate = Gate()
    monkeypatch.setattr(FilePack, "_swap", gate.after(FilePack._swap))
    with client_of(server) as storage, client_of(server) as reader:
        fill(storage)
        packer = ClientStorage(server.address)
        last = reader.lastTransaction()
        before = {number: reader.load(_oid(number)) for number in range(MEMBERS + 1)}
        gate.shut()
        background = Background(packer.pack, time.time() + SOON_S)
        gate.wait_until_reached()
        for number, found in before.items():
            reader.cache.forget(_oid(number))
            assert reader.load(_oid(number)) == found
        # Commits wait, and nobody else.
        voting = Background(_commit, reader)
        assert not voting.returns_soon()
        assert reader.server_status()["storages"]["1"]["pack"] is not None
        with client_of(server) as newcomer:
            assert newcomer.lastTransaction() == last
        gate.open()
        background.result()
        assert voting.result() > last
        for number, found in before.items():
            reader.cache.forget(_oid(number))
            assert reader.load(_oid(number)) == found
        packer.close()


def _oid(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _commit(storage: ClientStorage) -> bytes:
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    storage.store(storage.new_oid(), None, b"data", "", meta)
    storage.tpc_vote(meta)
    return storage.tpc_finish(meta)


def test_a_client_that_was_away_during_a_pack_hears_what_changed(server):
    with client_of(server) as storage, client_of(server) as away:
        fill(storage)
        writer = ClientStorage(server.address)
        away.ping()
        held = server.stream_of(away)
        server.on_loop(held.cut_off)
        tid = _commit(writer)
        writer.pack(time.time() + SOON_S)
        wait_until(lambda: away.lastTransaction() == tid, "the change")
        writer.close()


# The server's end


@pytest.fixture
def stopped_packers(tmp_path: Path, monkeypatch) -> Path:
    """Packers of server processes stop before they copy.

    Returns the folder where each leaves its pid.
    """
    folder = tmp_path / "packers"
    folder.mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        f"""\
import os, sys, threading
if "zeolith.storage.packer" in sys.orig_argv:
    from ZODB.FileStorage import fspack

    class Stopped(fspack.PackCopier):
        def __init__(self, *_args):
            open(os.path.join({str(folder)!r}, str(os.getpid())), "w").close()
            threading.Event().wait()

    fspack.PackCopier = Stopped
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_packer_ends_with_its_server(tmp_path, stopped_packers, monkeypatch, number):
    """Told to stop, or killed: nothing is left, and the next server packs."""
    (tmp_path / "server").mkdir()
    server = ServerProcess(tmp_path / "server")
    server.start()
    storage = ClientStorage(server.address, wait_timeout=1)
    fill(storage)
    storage = ClientStorage(server.address, wait_timeout=1)
    background = Background(storage.pack, time.time() + SOON_S)
    wait_until(lambda: list(stopped_packers.iterdir()), "the packer")
    (pid,) = (int(path.name) for path in stopped_packers.iterdir())
    assert (server.directory / "Data.fs.pack").exists()
    if number is signal.SIGTERM:
        server.terminate()
        assert "Traceback" not in server.stderr_text()
        assert not list(server.directory.glob("Data.fs.pack*"))
    else:
        server.kill()
    assert isinstance(background.error(), Exception)
    storage.close()
    wait_until(lambda: not _is_running(pid), "the end of the packer")
    monkeypatch.delenv("PYTHONPATH")
    server.start()
    again = ClientStorage(server.address)
    again.pack(time.time() + SOON_S)
    again.close()
    assert not list(server.directory.glob("Data.fs.pack*"))
    assert (server.directory / "Data.fs.old").exists()
    server.terminate()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
