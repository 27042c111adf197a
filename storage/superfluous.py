"""The blobs of revisions that a pack has removed.

The packer lists them, ``packing`` has them removed when the packed file is in place, in
a thread that may wait. The list may be older than the database, for a crash may lie
between: nothing is believed that the database does not confirm, so doing it again, or
late, does no harm.

A line of the list is hexadecimal: an oid (all revisions of a garbage object), or an oid
and a tid (one revision).
"""

import binascii
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ZODB.blob import BLOB_SUFFIX, link_or_copy, remove_committed

from zeolith.storage.tids import Z64


def remove_blobs(file: Any, list_path: str) -> None:
    """Remove the blobs that the list names and the FileStorage ``file`` has not.

    With the storage's pack_keep_old they are kept in ``.old`` beside the directory of
    the blobs, where hard links to the others make it one that goes with the old file.
    """
    if not os.path.exists(list_path):
        return
    kept = Path(file.blob_dir + ".old") if file.pack_keep_old else None
    with open(list_path, "rb") as lines:
        for line in lines:
            with suppress(binascii.Error):
                _remove_revisions(file, binascii.unhexlify(line.strip()), kept)
    if kept is not None:
        _link_the_others(Path(file.blob_dir), kept)


def _remove_revisions(file: Any, name: bytes, kept: Path | None) -> None:
    if len(name) not in (8, 16):
        # The end of a list that a crash has cut off.
        return
    oid = name[:8]
    directory = Path(file.fshelper.getPathForOID(oid))
    # Before the index is asked, or what is committed in between would be taken.
    paths = _finished(file, directory) if len(name) == 8 else []
    tids = {header.tid for header, _place, _start in file.generation.revisions(oid)}
    if len(name) == 16:
        paths = [] if name[8:] in tids else [_blob(file, oid, name[8:])]
    elif tids:
        paths = []
    for path in paths:
        if not path.exists():
            continue
        if kept is None:
            remove_committed(path)
        else:
            target = kept / path.relative_to(file.blob_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    if paths:
        _remove_empty(file, directory)


def _finished(file: Any, directory: Path) -> list[Path]:
    """The blobs in the directory of an object.

    Without that of a transaction which has voted: a client that still has a garbage
    object may store it again, and of that the index does not know yet.
    """
    last_tid = file.lastTransaction() or Z64
    tids = {
        path: file.fshelper.splitBlobFilename(str(path))[1]
        for path in sorted(directory.glob(f"*{BLOB_SUFFIX}"))
    }
    return [path for path, tid in tids.items() if tid is not None and tid <= last_tid]


def _blob(file: Any, oid: bytes, tid: bytes) -> Path:
    return Path(file.fshelper.getBlobFilename(oid, tid))


def _remove_empty(file: Any, directory: Path) -> None:
    """Remove the directory and those above it that are empty."""
    # Under the lock under which FileStorage makes them and moves a blob there.
    with suppress(OSError), file._lock:
        while directory != Path(file.blob_dir):
            directory.rmdir()
            directory = directory.parent


def _link_the_others(blob_dir: Path, kept: Path) -> None:
    kept.mkdir(exist_ok=True)
    for path in (blob_dir / ".layout", *blob_dir.rglob(f"*{BLOB_SUFFIX}")):
        target = kept / path.relative_to(blob_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked by an earlier try, or packed away in this moment.
        with suppress(FileExistsError, FileNotFoundError):
            link_or_copy(path, target)
