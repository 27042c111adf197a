"""Blobs on the loop: queues, pauses and ends, with workers that work when told."""

import asyncio
import errno
from dataclasses import replace
from typing import Any

import pytest
from ZODB.POSException import StorageError

from zeolith.protocol.messages import Goodbye
from zeolith.server import blobs
from zeolith.server.committer import Phase

from ..support.ids import number, transaction_id
from ..support.memory import UNHURRIED, MemoryClient, MemorySession
from ..support.model import ModelServer, ModelUpload

OID, OTHER = number(1), number(2)
X, Y = transaction_id(1), transaction_id(2)
METADATA = [b"", b"", b"", None, " "]
SMALL = replace(
    UNHURRIED,
    blob_backlog_bytes_max=100,
    batch_bytes_max=200,
    transaction_blobs_max=3,
    transaction_blob_bytes_max=1000,
)


class Server(ModelServer):
    """A model server that counts what became of uploads."""

    @property
    def uploads(self) -> list[ModelUpload]:
        begun: list[ModelUpload] = self.database.uploads.begun
        return begun

    @property
    def upload(self) -> ModelUpload:
        return self.uploads[-1]


class Reading:
    """Whether the server reads from a socket."""

    def __init__(self, client: MemoryClient, monkeypatch: pytest.MonkeyPatch):
        self.is_on = True
        self.pauses = 0
        transport = client.transport
        monkeypatch.setattr(transport, "pause_reading", self._pause, raising=False)
        monkeypatch.setattr(transport, "resume_reading", self._resume, raising=False)

    def _pause(self) -> None:
        self.is_on = False
        self.pauses += 1

    def _resume(self) -> None:
        self.is_on = True


@pytest.fixture
async def server() -> Server:
    return Server(limits=SMALL)


@pytest.fixture
async def channel(server: Server) -> MemoryClient:
    return MemorySession(server.service).channel()


@pytest.fixture
async def reading(channel: MemoryClient, monkeypatch: pytest.MonkeyPatch) -> Reading:
    return Reading(channel, monkeypatch)


def store_blob(blob: int = 0) -> list[Any]:
    return ["store_blob", OID, number(0), b"record", blob]


def send(channel: MemoryClient, data: bytes, blob: int = 0, id_: bytes = X) -> None:
    channel.tell("blob_chunk", id_, blob, data)


def vote(channel: MemoryClient, *operations: Any, id_: bytes = X) -> int:
    return channel.ask("vote", id_, METADATA, list(operations))


async def commit(server: Server, channel: MemoryClient, *operations: Any) -> None:
    voting = vote(channel, *operations)
    await server.workers.work()
    assert channel.value(voting)[0] == "voted"
    finishing = channel.ask("finish", X, number(0))
    await server.workers.work()
    channel.value(finishing)


# Writing


async def test_chunks_are_written_in_their_order_one_batch_at_a_time(server, channel):
    for data in (b"a" * 50, b"b" * 25, b"c" * 25):
        send(channel, data)
    # The first is with a thread; the others wait for it, together.
    await server.workers.blob_step()
    assert server.upload.files == {0: b"a" * 50}
    await server.workers.blob_step()
    assert server.upload.files == {0: b"a" * 50 + b"b" * 25 + b"c" * 25}


async def test_small_chunks_are_handed_over_together(server, channel):
    for _ in range(49):
        send(channel, b"a")
    await server.workers.work()
    assert not server.upload.files
    send(channel, b"a")
    await server.workers.work()
    assert server.upload.files == {0: b"a" * 50}


async def test_a_vote_writes_what_is_still_there(server, channel):
    send(channel, bytes(50))
    send(channel, b"rest")
    await commit(server, channel, store_blob())
    assert server.upload.files == {0: bytes(50) + b"rest"}


async def test_a_vote_waits_for_its_chunks(server, channel):
    send(channel, b"data")
    voting = vote(channel, store_blob())
    assert not server.workers.writes_waiting
    await server.workers.blob_step()
    assert not server.workers.writes_waiting
    # The second step is the sync.
    await server.workers.blob_step()
    assert server.workers.writes_waiting
    await server.workers.work()
    assert channel.value(voting)[0] == "voted"


async def test_what_is_left_goes_when_the_transaction_has_ended(server, channel):
    send(channel, b"data")
    await commit(server, channel, store_blob())
    assert server.upload.is_discarded


async def test_a_transaction_without_blobs_needs_no_files(server, channel):
    await commit(server, channel, ["store", OID, number(0), b"record"])
    assert not server.uploads


async def test_a_file_in_the_shared_directory_is_taken_before_the_vote(server, channel):
    shared = ["store_shared_blob", OID, number(0), b"record", "name.tmp"]
    voting = vote(channel, shared)
    assert not server.workers.writes_waiting
    await server.workers.work()
    assert channel.value(voting)[0] == "voted"


async def test_staged_blobs_are_blobs_too(server, channel):
    send(channel, b"data")
    channel.tell("stage", X, [store_blob()])
    await commit(server, channel)
    (upload,) = server.uploads
    assert upload.files == {0: b"data"}


# Pausing


async def test_too_much_that_waits_pauses_the_socket_until_half_is_written(
    server, channel, reading
):
    send(channel, bytes(50))
    send(channel, bytes(50))
    assert reading.is_on
    send(channel, bytes(10))
    assert not reading.is_on
    await server.workers.blob_step()
    # 60 bytes are left.
    assert not reading.is_on
    await server.workers.blob_step()
    assert reading.is_on
    assert reading.pauses == 1


async def test_chunks_that_are_empty_are_bounded_too(server, channel, reading):
    for _ in range(blobs.BATCH_CHUNKS):
        send(channel, b"")
    # They are with a thread; as many again may wait.
    for _ in range(blobs.BATCH_CHUNKS):
        send(channel, b"")
    assert reading.is_on
    send(channel, b"")
    assert not reading.is_on
    await server.workers.blob_step()
    assert not reading.is_on
    await server.workers.blob_step()
    assert reading.is_on
    await commit(server, channel, store_blob())
    assert server.upload.files == {0: b""}


async def test_what_is_discarded_does_not_keep_the_socket_paused(
    server, channel, reading
):
    send(channel, bytes(200))
    send(channel, bytes(200))
    assert not reading.is_on
    send(channel, b"", id_=Y)
    await server.workers.work()
    assert reading.is_on
    assert [each.is_discarded for each in server.uploads] == [True, False]


async def test_a_socket_that_closes_is_not_resumed(server, channel, reading):
    send(channel, bytes(200))
    assert not reading.is_on
    channel.peer.hang_up("stopping")
    await server.workers.work()
    assert not reading.is_on


async def test_a_large_upload_is_brought_to_the_disk_while_it_goes_on(
    server, channel, monkeypatch
):
    monkeypatch.setattr(blobs, "FLUSH_BYTES", 100)
    send(channel, bytes(60))
    await server.workers.blob_step()
    assert not server.upload.flushes
    send(channel, bytes(60))
    await server.workers.work()
    assert server.upload.flushes == 1


async def test_a_vote_waits_for_what_the_disk_says_of_a_flush(
    server, channel, monkeypatch
):
    monkeypatch.setattr(blobs, "FLUSH_BYTES", 50)
    send(channel, bytes(60))
    await server.workers.blob_step()
    server.upload.flush_error = OSError(errno.EIO, "Input/output error")
    voting = vote(channel, store_blob())
    await server.workers.work()
    assert "Input/output error" in channel.failure(voting).text
    assert server.upload.is_discarded
    assert server.database.steps == []


# Errors


async def test_a_full_disk_is_told_at_the_vote_and_frees_itself(server, channel):
    send(channel, bytes(50))
    server.upload.write_error = OSError(errno.ENOSPC, "no space left")
    await server.workers.blob_step()
    send(channel, b"more")
    await server.workers.work()
    assert server.upload.is_discarded
    voting = vote(channel, store_blob())
    await server.workers.work()
    assert "no space left" in channel.failure(voting).text
    assert server.database.steps == []
    # The channel is as good as before.
    again = vote(channel, id_=Y)
    await server.workers.work()
    assert channel.value(again)[0] == "voted"


async def test_a_vote_that_fails_leaves_nothing(server, channel):
    server.database.vote_error = StorageError("no")
    send(channel, b"data")
    voting = vote(channel, store_blob())
    await server.workers.work()
    assert channel.failure(voting).text == "no"
    assert server.upload.is_discarded


async def test_a_chunk_that_is_too_long_ends_the_socket(server, channel):
    send(channel, bytes(201))
    goodbye = channel.goodbye()
    assert goodbye.reason == "protocol"
    assert "batch_bytes_max" in goodbye.text


async def test_too_many_blobs_end_the_socket(server, channel):
    for blob in range(4):
        send(channel, b"", blob)
    assert "transaction_blobs_max" in channel.goodbye().text


async def test_too_many_bytes_of_blobs_end_the_socket_and_leave_nothing(
    server, channel
):
    for blob in (0, 1, 2, 0, 1):
        send(channel, bytes(200), blob)
    await server.workers.work()
    assert sum(map(len, server.upload.files.values())) == 1000
    send(channel, b"1", 2)
    assert "1000 bytes (transaction_blob_bytes_max)" in channel.goodbye().text
    await channel.lose()
    await server.workers.work()
    assert server.upload.is_discarded


async def test_each_transaction_has_its_own_bytes_for_blobs(server, channel):
    for transaction in (X, Y):
        for _ in range(5):
            send(channel, bytes(200), id_=transaction)
        await server.workers.work()
    assert [sum(map(len, each.files.values())) for each in server.uploads] == [1000] * 2
    assert channel.peer.is_there


async def test_a_storage_without_blobs_takes_no_chunks(server, channel):
    server.database.takes_blobs = False
    send(channel, b"data")
    assert "has no blobs" in channel.goodbye().text


# Ends


async def lose(_server: Server, channel: MemoryClient) -> None:
    await channel.lose()


async def abort(server: Server, channel: MemoryClient) -> None:
    aborting = channel.ask("abort", X)
    await server.workers.work()
    assert channel.value(aborting) is None


async def begin_another(_server: Server, channel: MemoryClient) -> None:
    send(channel, b"", id_=Y)


async def vote_for_another(server: Server, channel: MemoryClient) -> None:
    vote(channel, id_=Y)


@pytest.mark.parametrize("end", [lose, abort, begin_another, vote_for_another])
@pytest.mark.parametrize("steps", [0, 1])
async def test_an_end_before_the_vote_leaves_nothing(server, channel, end, steps):
    send(channel, bytes(50))
    send(channel, b"more")
    for _ in range(steps):
        await server.workers.blob_step()
    await end(server, channel)
    await server.workers.work()
    assert server.uploads[0].is_discarded


@pytest.mark.parametrize("steps", range(3))
async def test_a_channel_that_is_lost_while_its_vote_waits_does_not_vote(
    server, channel, steps
):
    send(channel, b"data")
    vote(channel, store_blob())
    for _ in range(steps):
        await server.workers.blob_step()
    commit = channel.peer.transactions.commit
    assert commit is not None
    await channel.lose()
    await server.workers.work()
    await asyncio.sleep(0)
    assert commit.phase is Phase.ENDED
    assert server.upload.is_discarded
    assert not server.committer.holders
    assert not server.database.is_in_transaction


async def test_a_stopping_server_takes_no_blobs_to_the_vote(server, channel):
    send(channel, b"data")
    voting = vote(channel, store_blob())
    await server.committer.drain(1)
    await server.workers.work()
    assert channel.failure(voting).name == "ShuttingDown"
    assert server.upload.is_discarded


async def test_an_upload_goes_with_its_channel_when_the_workers_have_ended(
    server, channel, monkeypatch
):
    send(channel, b"data")

    def refuse(*_args: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(server.workers, "write_blobs", refuse)
    await channel.lose()
    assert server.upload.is_discarded


# Waiting for the client


async def test_blobs_that_nobody_votes_on_are_not_kept(server, channel):
    server.service.transaction_timeout_s = 10
    send(channel, bytes(50))
    await server.workers.work()
    begun_at = asyncio.get_running_loop().time()
    server.service.tick(begun_at + 9)
    await server.workers.work()
    assert not server.upload.is_discarded
    server.service.tick(begun_at + 11)
    # What still comes does not matter any more.
    send(channel, bytes(50))
    await server.workers.work()
    assert server.upload.is_discarded
    assert server.upload.files == {0: bytes(50)}
    voting = vote(channel, store_blob())
    await server.workers.work()
    assert channel.failure(voting).name == "TransactionTimeout"
    assert server.database.steps == []


async def test_blobs_that_the_disk_is_busy_with_are_not_late(server, channel):
    server.service.transaction_timeout_s = 10
    send(channel, bytes(50))
    server.service.tick(asyncio.get_running_loop().time() + 11)
    await commit(server, channel, store_blob())
    assert server.upload.files == {0: bytes(50)}


# Loading


async def load(server: Server, channel: MemoryClient, tid: bytes, size: int) -> Any:
    loading = channel.ask("load_blob", OID, tid, 2, size)
    await server.workers.work()
    return channel.answer(loading)


async def test_a_part_of_a_blob_is_not_longer_than_a_batch(server, channel):
    tid = server.commit(OID, b"record")
    server.database.blobs[OID, tid] = bytes(1000)
    size, data = (await load(server, channel, tid, 10**9)).value
    assert (size, len(data)) == (1000, 200)


async def test_a_blob_that_is_not_announced_is_not_there(server, channel):
    tid = server.commit(OID, b"record")
    later = number(int.from_bytes(tid, "big") + 1)
    server.database.blobs[OID, later] = b"voted"
    assert (await load(server, channel, later, 10)).name == "POSKeyError"


async def test_an_offset_beyond_all_files_is_an_error_and_nothing_else(server, channel):
    tid = server.commit(OID, b"record")
    loading = channel.ask("load_blob", OID, tid, 2**63, 1)
    assert channel.failure(loading).name == "ValueError"
    assert not isinstance(channel.received()[-1:], Goodbye)
