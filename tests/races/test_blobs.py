"""Blobs on their way, while something goes wrong or somebody else is busy, too."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError, POSError
from ZODB.utils import z64

from zeolith.client import session
from zeolith.client.channel import Channel
from zeolith.client.dial import dial_channel
from zeolith.client.downloads import PART_BYTES, PARTS_AHEAD
from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.protocol.limits import Limits
from zeolith.server.blobs import Uploading
from zeolith.server.peer import Peer
from zeolith.storage.blobs import Upload
from zeolith.storage.disk import Disk
from zeolith.storage.filestore import FileStore

from ..storage.transactions import record
from ..support.gates import Background, Gate
from ..support.inprocess import InProcessServer
from ..support.proxy import Direction, Proxy, proxied
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

MEGABYTE = 1024 * 1024
RECORD = record(Blob, None)
FILESTORAGE = """\
<filestorage 1>
  path Data.fs
  blob-dir blobs
</filestorage>
"""


class Client:
    """A storage with a blob cache, and what a test does with blobs."""

    def __init__(self, storage: ClientStorage, folder: Path):
        self.storage = storage
        self._folder = folder
        self._files = 0

    def begin(self) -> TransactionMetaData:
        transaction = TransactionMetaData()
        self.storage.tpc_begin(transaction)
        return transaction

    def store(
        self,
        transaction: TransactionMetaData,
        oid: bytes,
        data: bytes,
        serial: bytes = z64,
    ) -> None:
        self._files += 1
        path = self._folder / f"uncommitted-{self._files}"
        path.write_bytes(data)
        self.storage.storeBlob(oid, serial, RECORD, str(path), "", transaction)

    def finish(self, transaction: TransactionMetaData) -> bytes:
        self.storage.tpc_vote(transaction)
        tid: bytes = self.storage.tpc_finish(transaction)
        return tid

    def commit(self, oid: bytes, data: bytes, serial: bytes = z64) -> bytes:
        transaction = self.begin()
        try:
            self.store(transaction, oid, data, serial)
            return self.finish(transaction)
        except BaseException:
            self.storage.tpc_abort(transaction)
            raise

    def read(self, oid: bytes, tid: bytes) -> bytes:
        with self.storage.openCommittedBlobFile(oid, tid) as file:
            return bytes(file.read())

    @property
    def left(self) -> list[Path]:
        """What is left of uncommitted blobs."""
        temporary = Path(self.storage.temporaryDirectory())
        return [*temporary.iterdir(), *self._folder.glob("uncommitted-*")]


def new_client(address: Any, folder: Path, **options: Any) -> Client:
    folder.mkdir()
    cache = str(folder / "cache")
    storage = ClientStorage(address, blob_dir=cache, **options)
    return Client(storage, folder)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    folder = tmp_path / "server"
    folder.mkdir()

    def open_() -> FileStore:
        return FileStore("1", str(folder / "Data.fs"), blob_dir=str(folder / "blobs"))

    limits = Limits(blob_backlog_bytes_max=300_000)
    with InProcessServer({"1": open_}, limits=limits) as server:
        yield server


def files_at(server: InProcessServer) -> list[Path]:
    """Uploads and whatever else is neither a committed blob nor always there."""
    blobs = Path(server.database.uploads.shared).parent
    return [
        path
        for path in blobs.rglob("*")
        if path.is_file()
        and path.suffix != ".blob"
        and path.name not in ("lock", ".layout")
    ]


def wait_until_nothing_is_left(server: InProcessServer, *clients: Client) -> None:
    wait_until(lambda: not files_at(server), "the end of the uploads at the server")
    for client in clients:
        assert not client.left


@pytest.fixture
def client(server: InProcessServer, tmp_path: Path) -> Iterator[Client]:
    client = new_client(server.address, tmp_path / "client")
    yield client
    client.storage.close()


@pytest.fixture
def other(server: InProcessServer, tmp_path: Path) -> Iterator[Client]:
    client = new_client(server.address, tmp_path / "other")
    yield client
    client.storage.close()


@pytest.fixture
def proxy(server: InProcessServer) -> Iterator[Proxy]:
    with proxied(server.address) as proxy:
        yield proxy


@pytest.fixture
def distant(proxy: Proxy, tmp_path: Path) -> Iterator[Client]:
    """A client behind the proxy."""
    client = new_client(proxy.address, tmp_path / "distant")
    yield client
    client.storage.close()


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> Gate:
    """The gate before every write of an upload."""
    monkeypatch.setattr(Upload, "write", gate.before(Upload.write))
    return gate


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all chunks that servers of this process have got."""
    sizes: list[int] = []
    receive = Uploading.receive

    def watched(self: Uploading, number: int, data: bytes) -> None:
        sizes.append(len(data))
        receive(self, number, data)

    monkeypatch.setattr(Uploading, "receive", watched)
    return sizes


# Several at once


def test_two_large_uploads_at_once_through_tiny_buffers(server, client, monkeypatch):
    """Chunks of several blobs come mixed, and sockets pause while disks write."""
    pauses: list[Peer] = []
    pause, dial = Peer.hold_reading, dial_channel

    def counted(self: Peer) -> None:
        pauses.append(self)
        pause(self)

    def dial_with_tiny_buffers(*args: Any) -> Any:
        channel = dial(*args)
        channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return channel

    monkeypatch.setattr(Peer, "hold_reading", counted)
    monkeypatch.setattr(session, "dial_channel", dial_with_tiny_buffers)
    data = [os.urandom(8 * MEGABYTE + n) for n in range(2)]
    oids = [client.storage.new_oid() for _ in data]
    committing = [
        Background(lambda oid=oid, each=each: client.commit(oid, each))
        for oid, each in zip(oids, data, strict=True)
    ]
    tids = [each.result() for each in committing]
    assert pauses
    wait_until_nothing_is_left(server, client)
    for oid, tid, each in zip(oids, tids, data, strict=True):
        assert server.database.load_blob(oid, tid, 0, 2**30).data == each


def test_a_transaction_may_have_many_blobs_and_each_is_sent_once(
    server, client, other, sent
):
    transaction = client.begin()
    blobs = {client.storage.new_oid(): os.urandom(n * 300) for n in range(200)}
    for oid, data in blobs.items():
        client.store(transaction, oid, data)
    tid = client.finish(transaction)
    assert sum(sent) == sum(map(len, blobs.values()))
    assert len(sent) == len(blobs)
    for oid, data in blobs.items():
        assert other.read(oid, tid) == data
    wait_until_nothing_is_left(server, client, other)


def test_a_blob_is_one_record_and_one_oid_of_its_change(server, client):
    oid = client.storage.new_oid()
    tid = client.commit(oid, b"data")
    assert len(client.storage.history(oid, 10)) == 1
    change = server.on_loop(lambda: server.served.changes._changes[-1])
    assert change.oids == [oid]
    server.stop()
    storage = FileStorage(server.database._path, read_only=True)
    (oids,) = [[each.oid for each in found] for found in storage.iterator(tid)]
    assert oids == [oid]
    storage.close()


# A slow disk


def test_a_disk_that_is_slow_for_one_is_not_slow_for_others(
    server, client, other, slow_disk
):
    oid, small = client.storage.new_oid(), other.storage.new_oid()
    slow_disk.shut()
    committing = Background(lambda: client.commit(oid, bytes(5 * MEGABYTE)))
    slow_disk.wait_until_reached()
    transaction = other.begin()
    other.storage.store(small, z64, RECORD, "", transaction)
    tid = other.finish(transaction)
    assert other.storage.getTid(small) == tid
    slow_disk.open()
    assert client.read(oid, committing.result()) == bytes(5 * MEGABYTE)


def test_a_vote_that_waits_for_the_disk_does_not_hold_the_turn(
    server, client, other, slow_disk
):
    oid, small = client.storage.new_oid(), other.storage.new_oid()
    transaction = client.begin()
    slow_disk.shut()
    client.store(transaction, oid, b"data")
    finishing = Background(lambda: client.finish(transaction))
    slow_disk.wait_until_reached()
    second = other.begin()
    other.storage.store(small, z64, RECORD, "", second)
    assert other.finish(second)
    slow_disk.open()
    assert client.read(oid, finishing.result()) == b"data"


def test_an_upload_that_the_disk_cannot_follow_waits_in_the_client(
    server, client, slow_disk, sent
):
    """Neither side keeps what the other cannot take."""
    oid = client.storage.new_oid()
    slow_disk.shut()
    committing = Background(lambda: client.commit(oid, bytes(50 * MEGABYTE)))
    slow_disk.wait_until_reached()
    wait_until(
        lambda: server.on_loop(
            lambda: any(peer._holds for peer in server.service.peers)
        ),
        "a socket that is not read",
    )
    assert sum(sent) < 2 * MEGABYTE
    slow_disk.open()
    committing.result()
    assert sum(sent) == 50 * MEGABYTE


def test_a_full_disk_is_told_at_the_vote_and_nothing_is_left(
    server, client, monkeypatch
):
    oid = client.storage.new_oid()
    with monkeypatch.context() as full:

        def write(_self: Upload, _chunks: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(Upload, "write", write)
        with pytest.raises(Exception, match="No space left"):
            client.commit(oid, bytes(2 * MEGABYTE))
    wait_until_nothing_is_left(server, client)
    tid = client.commit(oid, b"later")
    assert client.read(oid, tid) == b"later"


# Abort


def test_an_abort_while_chunks_are_queued_leaves_nothing(server, client, slow_disk):
    transaction = client.begin()
    slow_disk.shut()
    for data in (bytes(100_000), b"x", bytes(50_000)):
        client.store(transaction, client.storage.new_oid(), data)
    slow_disk.wait_until_reached()
    client.storage.tpc_abort(transaction)
    slow_disk.open()
    wait_until_nothing_is_left(server, client)
    # The channel is as good as before.
    oid = client.storage.new_oid()
    assert client.read(oid, client.commit(oid, b"data")) == b"data"


@pytest.mark.parametrize("voted", [False, True])
def test_an_abort_leaves_nothing_wherever_the_transaction_stands(server, client, voted):
    transaction = client.begin()
    client.store(transaction, client.storage.new_oid(), bytes(MEGABYTE))
    if voted:
        client.storage.tpc_vote(transaction)
    client.storage.tpc_abort(transaction)
    wait_until_nothing_is_left(server, client)
    blobs = server.database.uploads.shared.parent
    assert not list(blobs.rglob("*.blob"))


def test_a_conflict_leaves_nothing_and_the_next_try_works(server, client, other):
    oid = client.storage.new_oid()
    first = client.commit(oid, b"first")
    transaction = client.begin()
    client.store(transaction, oid, b"mine", first)
    second = other.commit(oid, b"theirs", first)
    with pytest.raises(ConflictError):
        client.storage.tpc_vote(transaction)
    client.storage.tpc_abort(transaction)
    wait_until_nothing_is_left(server, client, other)
    third = client.commit(oid, b"mine", second)
    assert other.read(oid, third) == b"mine"
    assert other.read(oid, second) == b"theirs"


# The connection is lost


def test_a_connection_that_breaks_in_an_upload_leaves_nothing(
    server, distant, proxy, slow_disk
):
    oid = distant.storage.new_oid()
    slow_disk.shut()
    committing = Background(lambda: distant.commit(oid, bytes(20 * MEGABYTE)))
    slow_disk.wait_until_reached()
    proxy.cut()
    slow_disk.open()
    with pytest.raises(ClientDisconnected, match="nothing was committed"):
        committing.result()
    wait_until_nothing_is_left(server, distant)
    assert distant.read(oid, distant.commit(oid, b"data")) == b"data"


def test_a_connection_that_breaks_between_upload_and_vote_is_told(
    server, distant, proxy
):
    transaction = distant.begin()
    distant.store(transaction, distant.storage.new_oid(), b"data")
    proxy.cut()
    with pytest.raises(ClientDisconnected):
        distant.storage.tpc_vote(transaction)
    distant.storage.tpc_abort(transaction)
    wait_until_nothing_is_left(server, distant)


UPLOADER = """
import sys
from ZODB.Connection import TransactionMetaData
from ZODB.utils import z64
from zeolith.client.storage import ClientStorage

port, cache, path = sys.argv[1:]
storage = ClientStorage(int(port), blob_dir=cache)
transaction = TransactionMetaData()
storage.tpc_begin(transaction)
storage.storeBlob(storage.new_oid(), z64, b"record", path, "", transaction)
raise AssertionError("the disk was meant to be slow")
"""


def test_a_client_that_is_killed_in_an_upload_leaves_nothing(
    server, slow_disk, tmp_path
):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(50 * MEGABYTE)
    slow_disk.shut()
    arguments = [str(server.address[1]), str(tmp_path / "cache"), str(large)]
    uploader = subprocess.Popen([sys.executable, "-c", UPLOADER, *arguments])
    try:
        slow_disk.wait_until_reached()
    finally:
        uploader.kill()
        uploader.wait()
    slow_disk.open()
    wait_until_nothing_is_left(server)
    wait_until(lambda: server.status()["peers"] == 0, "the end of its sockets")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_goes_in_an_upload_leaves_nothing(
    tmp_path, number, monkeypatch, gate
):
    sending = count()
    send = Channel.send_patiently

    def send_some(self: Channel, data: bytes) -> None:
        if next(sending) == 10:
            gate.shut()
            gate.pass_through()
        send(self, data)

    monkeypatch.setattr(Channel, "send_patiently", send_some)
    folder = tmp_path / "server"
    folder.mkdir()
    server = ServerProcess(folder, storages=FILESTORAGE)

    def uploads() -> list[Path]:
        return list((folder / "blobs").glob(".zeolith-uploads-*/*.upload"))

    with server:
        client = new_client(server.address, tmp_path / "client")
        oid = client.storage.new_oid()
        committing = Background(lambda: client.commit(oid, bytes(20 * MEGABYTE)))
        gate.wait_until_reached()
        wait_until(uploads, "a beginning at the server")
        if number is signal.SIGKILL:
            server.kill()
            assert uploads()
        else:
            server.terminate()
            assert not uploads()
        gate.open()
        with pytest.raises(ClientDisconnected):
            committing.result()
        assert not client.left
        server.start()
        assert not uploads()
        tid = client.commit(oid, b"data")
        assert client.read(oid, tid) == b"data"
        client.storage.close()


# Loading


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets of all parts that servers of this process were asked for."""
    offsets: list[int] = []
    load = FileStore.load_blob

    def watched(self: FileStore, oid: bytes, tid: bytes, *part: int) -> Any:
        offsets.append(part[0])
        return load(self, oid, tid, *part)

    monkeypatch.setattr(FileStore, "load_blob", watched)
    return offsets


def test_a_download_goes_on_where_the_connection_broke(
    server, client, distant, proxy, asked
):
    data = os.urandom(5 * MEGABYTE + 1)
    oid = client.storage.new_oid()
    tid = client.commit(oid, data)
    proxy.cut_after(2 * MEGABYTE + 5000, Direction.TO_CLIENT)
    assert distant.read(oid, tid) == data
    assert proxy.was_cut.is_set()
    whole = range(0, len(data), PART_BYTES)
    assert set(asked) == set(whole)
    # And what was on its way is asked for again, no more.
    assert len(asked) <= len(whole) + PARTS_AHEAD


def test_a_download_goes_on_when_the_server_has_been_started_again(
    server, client, distant, proxy, asked
):
    data = os.urandom(5 * MEGABYTE)
    oid = client.storage.new_oid()
    tid = client.commit(oid, data)
    client.storage.close()
    proxy.cut_after(2 * MEGABYTE + 5000, Direction.TO_CLIENT)
    loading = Background(lambda: distant.read(oid, tid))
    assert proxy.was_cut.wait(30)
    server.restart()
    assert loading.result() == data
    assert len(asked) <= len(data) // PART_BYTES + PARTS_AHEAD


def test_a_download_without_a_server_ends_with_the_wait(server, client, tmp_path):
    oid = client.storage.new_oid()
    tid = client.commit(oid, b"data")
    reader = new_client(server.address, tmp_path / "reader", wait_timeout=0.5)
    server.stop()
    with pytest.raises(ClientDisconnected):
        reader.read(oid, tid)
    server.start()
    wait_until(reader.storage.is_connected, "the new session")
    assert reader.read(oid, tid) == b"data"
    reader.storage.close()


def test_a_blob_that_is_not_announced_cannot_be_loaded(
    server, client, other, monkeypatch
):
    """It has its place before its record is on the disk."""
    gate = Gate()
    monkeypatch.setattr(Disk, "sync", gate.before(Disk.sync))
    oid = client.storage.new_oid()
    transaction = client.begin()
    client.store(transaction, oid, b"data")
    client.storage.tpc_vote(transaction)
    gate.shut()
    finishing = Background(client.storage.tpc_finish, transaction)
    gate.wait_until_reached()
    (path,) = Path(server.database._file.blob_dir).rglob("*.blob")
    tid = bytes.fromhex(path.stem.removeprefix("0x"))
    assert server.database.load_blob(oid, tid, 0, 10).size == 4
    with pytest.raises(POSError):
        other.storage.loadBlob(oid, tid)
    gate.open()
    assert finishing.result() == tid
    assert other.read(oid, tid) == b"data"
