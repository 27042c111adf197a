"""A server that is killed has saved its index meanwhile, and starts from there."""

import signal
from pathlib import Path

from ZODB.Connection import TransactionMetaData
from ZODB.fsIndex import fsIndex
from ZODB.utils import p64, z64

from zeolith.client import ClientStorage
from zeolith.storage.indexed import GROWTH_MIN_BYTES

from ..support.serving import ServerProcess
from ..support.waiting import wait_until


def commit(storage: ClientStorage, oid: int, data: bytes) -> None:
    metadata = TransactionMetaData()
    storage.tpc_begin(metadata)
    storage.store(p64(oid), z64, data, "", metadata)
    storage.tpc_vote(metadata)
    storage.tpc_finish(metadata)


def index_end(path: Path) -> int:
    """Up to where in Data.fs its index goes."""
    end: int = fsIndex.load(f"{path}.index")["pos"]
    return end


def test_after_a_kill_only_what_was_not_saved_is_read(tmp_path: Path):
    with ServerProcess(tmp_path, options="index-interval 1h") as server:
        storage = ClientStorage(server.address)
        commit(storage, 1, bytes(GROWTH_MIN_BYTES))
        size = server.data_path.stat().st_size
        assert index_end(server.data_path) < size
        server.rewrite("index-interval 1h", "index-interval 0.1s")
        server.send(signal.SIGHUP)
        wait_until(lambda: index_end(server.data_path) == size, "the index")
        commit(storage, 2, b"not in the index")
        storage.close()
        server.kill()
        assert index_end(server.data_path) == size
        server.restart()
        storage = ClientStorage(server.address)
        assert storage.load(p64(1))[0] == bytes(GROWTH_MIN_BYTES)
        assert storage.load(p64(2))[0] == b"not in the index"
        storage.close()
    for text in ("Traceback", "Ignoring", "is not used", "WARNING"):
        assert text not in server.stderr_text()
