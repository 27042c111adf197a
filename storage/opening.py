"""From a configuration section to an open database.

Called once for each storage, before the server's loop starts (it may scan a whole
file). Every mistake of the operator's becomes an OpeningError whose text is one line.
"""

import os
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import ZODB.config
from zc.lockfile import LockError
from ZODB.FileStorage.FileStorage import FileStorageFormatError
from ZODB.POSException import POSError

from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.filestore import FileStore
from zeolith.storage.identity import IdentityError
from zeolith.storage.relayed import RelayedStorage, is_remote
from zeolith.storage.wrapped import NotAWrapper, WrappedFileStore

_FILESTORAGE_OPTIONS = (
    "blob_dir",
    "create",
    "read_only",
    "quota",
    "pack_gc",
    "pack_keep_old",
)


# POSError: the file is no Data.fs, or a damaged one.
_MISTAKES = (LockError, IdentityError, POSError, OSError, ValueError, ImportError)


class OpeningError(Exception):
    """A storage cannot be opened; the text is one line that says which and why."""


def open_database(name: str, factory: Any, *, is_read_only: bool) -> AdaptedStorage:
    """The database ``name`` that ``factory``, a ZODB storage section, describes.

    A ``<filestorage>``, plain or below wrappers, gets our own FileStore, a client of
    another server a RelayedStorage, everything else an adapter. With
    ``is_read_only`` a Data.fs is opened read-only; other storages are left to the
    server to protect. Raises OpeningError.
    """
    try:
        if _is_filestorage(factory):
            return _open_filestore(name, factory.config, is_read_only, FileStore)
        wrapped = _open_wrapped(name, factory, is_read_only)
        if wrapped is not None:
            return wrapped
        storage = factory.open()
        if is_remote(storage):
            return RelayedStorage(name, storage)
        return AdaptedStorage(name, storage, uuid.uuid4().bytes)
    except _MISTAKES as error:
        raise OpeningError(f"storage {name}: {_line(error)}") from error


def open_file(name: str, path: str, blob_dir: str | None) -> FileStore:
    """The database in the Data.fs at ``path``; raises OpeningError."""
    try:
        return FileStore(name, path, blob_dir=blob_dir)
    except _MISTAKES as error:
        raise OpeningError(f"{path}: {_line(error)}") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, LockError):
        return f"another process has it open ({text})"
    if isinstance(error, FileStorageFormatError):
        return f"{text} is not a Data.fs"
    return text


class _Opened:
    """Stands for the section of a storage that is open already."""

    def __init__(self, storage: Any):
        self._storage = storage

    def open(self) -> Any:
        return self._storage


def _is_filestorage(section: Any) -> bool:
    return type(section) is ZODB.config.FileStorage and not section.config.packer


def _open_wrapped(name: str, factory: Any, is_read_only: bool) -> FileStore | None:
    """The Data.fs in a section of a section; None if there is none to be had."""
    above, section = None, factory
    while hasattr(getattr(section, "config", None), "base"):
        above, section = section, section.config.base
    if above is None or not _is_filestorage(section):
        return None

    def wrap(file: Any) -> Any:
        above.config.base = _Opened(file)
        return factory.open()

    make = partial(WrappedFileStore, wrap=wrap)
    try:
        return _open_filestore(name, section.config, is_read_only, make)
    except NotAWrapper:
        return None
    finally:
        above.config.base = section


def _open_filestore(
    name: str, config: Any, is_read_only: bool, make: Callable[..., FileStore]
) -> FileStore:
    options = {
        option: getattr(config, option)
        for option in _FILESTORAGE_OPTIONS
        if getattr(config, option, None) is not None
    }
    if is_read_only:
        options["read_only"] = True
        if not os.path.exists(config.path):
            raise OpeningError(f"storage {name}: {config.path} is not there to read")
    return make(name, config.path, **options)
