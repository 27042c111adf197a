"""Blobs between the application and the server: sent before the vote, fetched in parts.

``Uploads`` has the files of one transaction; it belongs to the thread that commits.
What is sent goes over the transaction's own channel, part by part, and the socket is
what slows the sender down: neither side keeps more than some parts in memory. A file
is sent once, when it is stored, and not again at the vote.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

from ZODB.blob import FilesystemHelper
from ZODB.interfaces import IBlobStorage
from ZODB.POSException import Unsupported

from zeolith.client.blob_directory import discard
from zeolith.client.blobs import BlobCache, SharedBlobs
from zeolith.client.channel import Channel
from zeolith.client.downloads import Converse, fetch
from zeolith.client.tids import Z64
from zeolith.protocol.codec import encode
from zeolith.protocol.limits import Limits
from zeolith.protocol.messages import Notice

if TYPE_CHECKING:
    from zeolith.client.commit import Commit

Blobs = BlobCache | SharedBlobs

# Of a chunk: whoever shares the server's loop does not notice it, and buffers of this
# size are used again by malloc, where larger ones are mapped anew each time.
SENT_BYTES = 60 * 1024


class Uploads:
    """The blobs that one transaction has stored."""

    def __init__(self, blobs: Blobs | None, transaction_id: bytes):
        self._blobs = blobs
        self._transaction_id = transaction_id
        # Of each blob its oid and its file, which is ours until the end.
        self._files: list[tuple[bytes, str]] = []

    @property
    def is_shared(self) -> bool:
        """Whether the server sees the files, so that none has to be sent."""
        return isinstance(self._blobs, SharedBlobs)

    def take(self, oid: bytes, path: str) -> int:
        """Take over the file of a blob; returns the number of the blob."""
        if self._blobs is None:
            raise Unsupported("blobs need a blob_dir")
        self._files.append((oid, self._blobs.take(path)))
        return len(self._files) - 1

    def name(self, number: int) -> str:
        """The name of a file in the directory that the server has, too."""
        return os.path.basename(self._files[number][1])

    def send(self, number: int, channel: Channel, limits: Limits) -> None:
        """Send a blob; raises ChannelLost, OSError."""
        size = min(SENT_BYTES, limits.batch_bytes_max)
        with open(self._files[number][1], "rb", buffering=0) as file:
            data = file.read(size)
            while True:
                arguments = [self._transaction_id, number, data]
                channel.send_patiently(encode(Notice("blob_chunk", arguments)))
                data = file.read(size)
                if not data:
                    # An empty blob has one part, too.
                    return

    def adopt(self, tid: bytes) -> None:
        """The transaction is committed: keep the files, so that none is fetched."""
        files, self._files = self._files, []
        # Of a blob that was stored twice the last one counts.
        kept = dict(files)
        for oid, path in files:
            if kept[oid] == path and self._blobs is not None:
                self._blobs.adopt(oid, tid, path)
            else:
                discard(path)

    def close(self) -> None:
        """Remove what was not adopted; may be called again."""
        while self._files:
            discard(self._files.pop()[1])


def open_blobs(
    blob_dir: str | None,
    is_shared: bool,
    size_bytes: int | None,
    check_percent: int,
) -> Blobs | None:
    """Where blobs are to be; None without ``blob_dir``. Raises ValueError, OSError."""
    if blob_dir is None:
        if is_shared:
            raise ValueError("shared_blob_dir without blob_dir")
        return None
    if is_shared:
        return SharedBlobs(blob_dir)
    return BlobCache(blob_dir, size_bytes, check_percent)


def fshelper_of(blobs: Blobs) -> Any:
    """What ZODB's tools want of a storage's ``fshelper``: for a cache, ``temp_dir``."""
    if isinstance(blobs, SharedBlobs):
        return FilesystemHelper(blobs.directory)
    return SimpleNamespace(temp_dir=blobs.temporary_directory())


class BlobMethods:
    """IBlobStorage and IBlobStorageRestoreable, as a ClientStorage inherits them."""

    blobs: Blobs | None
    limits: Limits
    converse: Converse
    _begun: Callable[[Any], "Commit"]

    def loadBlob(self, oid: bytes, serial: bytes) -> str:
        """The path of the blob's file, fetched if it is not there; POSKeyError."""
        return self._blobs().path_of(oid, serial, self._fetch)

    def openCommittedBlobFile(self, oid: bytes, serial: bytes, blob: Any = None) -> Any:
        """The blob's file, open for reading: of ``blob``, or an ordinary file."""
        return self._blobs().open(oid, serial, blob, self._fetch)

    def temporaryDirectory(self) -> str:
        """Where uncommitted blobs are on the file system of the committed ones."""
        return self._blobs().temporary_directory()

    @property
    def fshelper(self) -> Any:
        """What ZODB and its tools look for at a storage with blobs."""
        if self.blobs is None:
            raise AttributeError("a storage without blob_dir has no fshelper")
        return fshelper_of(self.blobs)

    def _blobs(self) -> Blobs:
        if self.blobs is None:
            raise Unsupported("blobs need a blob_dir, and this storage has none")
        return self.blobs

    def _fetch(self, oid: bytes, tid: bytes, file: BinaryIO) -> None:
        fetch(self.converse, oid, tid, file, self.limits)

    def storeBlob(
        self,
        oid: bytes,
        oldserial: bytes | str | None,
        data: bytes,
        blobfilename: str,
        version: str,
        transaction: Any,
    ) -> None:
        """Write a blob: its record, and its file, which is taken away and sent."""
        assert not version, "versions are not supported"
        commit = self._begun_with_blobs(transaction)
        if isinstance(oldserial, str):
            # As ZODB's own tests of blobs have it.
            oldserial = oldserial.encode("latin-1")
        commit.store_blob(oid, oldserial or Z64, data, blobfilename)

    def restoreBlob(
        self,
        oid: bytes,
        serial: bytes,
        data: bytes,
        blobfilename: str,
        prev_txn: bytes | None,
        transaction: Any,
    ) -> None:
        """Write a blob of a transaction that is copied; see IBlobStorageRestoreable."""
        commit = self._begun_with_blobs(transaction)
        commit.restore_blob(oid, serial, data, prev_txn, blobfilename)

    def _begun_with_blobs(self, transaction: Any) -> "Commit":
        if not IBlobStorage.providedBy(self):
            raise Unsupported("the server's storage has no blobs")
        return self._begun(transaction)
