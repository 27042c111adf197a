"""``zeolith copy``: a database from one place to another, and the same afterwards.

The program ``zeolith`` finds the command through an entry point, so that the server
does not import the client. The exit codes are the program's: 0, 1 (it could not be
done, or is not the same), 2 (the command line is wrong), and 130 for Ctrl-C, after
which the copy can be continued. A mistake of the operator's is one line.
"""

import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import click
import ZConfig
from persistent.TimeStamp import TimeStamp
from zc.lockfile import LockError
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileIterator, FileStorageFormatError
from ZODB.interfaces import (
    IBlobStorage,
    IBlobStorageRestoreable,
    IStorageIteration,
)
from ZODB.POSException import POSError, POSKeyError
from zodburi import resolve_uri

from zeolith.client.copying import blob_of, copy_transactions, is_wrapped
from zeolith.client.record_class import is_blob_record
from zeolith.client.tids import Z64, following, preceding

_INTERRUPTED = 130
# The magic number, and a transaction with nothing in it.
_TRANSACTION_BYTES_MIN = 4 + 23 + 8
_STORAGES = """
<schema>
  <import package="ZODB"/>
  <multisection type="ZODB.storage" name="*" attribute="storages"/>
  <multisection type="ZODB.database" name="*" attribute="databases"/>
</schema>
"""
# What a storage, a file or a socket says of an operator's mistake.
_MISTAKES = (POSError, LockError, OSError, ValueError, ImportError)
# What other commands take for a server, and what no Data.fs is called.
_ADDRESS = re.compile(r"[^/]*:[0-9]+|[0-9]+")
_NO_DATA_FILES = (".conf", ".ini", ".cfg", ".xml", ".zcml")


class CopyError(Exception):
    """The copy cannot be made; the text is one line."""


class _VerifyInterrupted(KeyboardInterrupt):
    """Ctrl-C, after all was copied."""


class _File:
    """A Data.fs that is only read, without its index, also while it is served."""

    def __init__(self, path: str):
        self._path = path
        self.iterator().close()

    def iterator(self, start: bytes | None = None, stop: bytes | None = None) -> Any:
        return FileIterator(self._path, start, stop)

    def lastTransaction(self) -> bytes:
        """About the last one: what is being committed may come after it."""
        with open(self._path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < _TRANSACTION_BYTES_MIN:
                return Z64
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(8), "big")
            file.seek(max(4, size - 8 - length))
            return file.read(8)

    def close(self) -> None:
        """Each iterator has its own file."""


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option(
    "--since",
    metavar="TID|TIME",
    help="Copy only what is later: 16 hexadecimal digits, or a UTC time like"
    " 2026-11-21T10:00:00. Without it: what is later than the destination's last.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    help="Read and compare all that was copied at the end (the default).",
)
@click.option(
    "--verify-all",
    is_flag=True,
    help="Compare all that the destination has, also what was copied before.",
)
@click.option("--without-blobs", is_flag=True, help="Leave blob files out.")
@click.option(
    "--skip-missing-blobs",
    is_flag=True,
    help="Go on where a blob's file is not in SOURCE, and say how many.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
def copy(
    source: str,
    destination: str,
    since: str | None,
    verify: bool,
    verify_all: bool,
    without_blobs: bool,
    skip_missing_blobs: bool,
    quiet: bool,
) -> None:
    """Copy the transactions of SOURCE to the end of DESTINATION.

    Each of them is a Data.fs, a ZConfig file (FILE#NAME for one of several storages)
    or a URI: zeolith://, file://, zeo:// and others that zodburi knows.
    """
    # What storages say of an index or a lock is told in a line, or does not matter.
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level="ERROR")
    if verify_all and not verify:
        raise click.UsageError("--verify-all and --no-verify contradict each other")
    since_tid = None if since is None else max(_tid(since), Z64)
    try:
        with ExitStack() as stack:
            for name in ("zc.lockfile", "ZODB.FileStorage"):
                stack.enter_context(_silenced(logging.getLogger(name)))
            from_ = _opened(source, stack, is_source=True)
            to = _opened(destination, stack, is_source=False)
            job = _Copy(from_, to, without_blobs, skip_missing_blobs, quiet)
            start = job.start(since_tid)
            job.copy(start)
            if verify:
                job.verify(start, all_of_it=verify_all)
            job.summary()
    except CopyError as error:
        _exit(1, str(error))
    except _VerifyInterrupted:
        _exit(
            _INTERRUPTED,
            "interrupted; all is copied, but not all of it is compared: --verify-all"
            " does that",
        )
    except KeyboardInterrupt:
        _exit(_INTERRUPTED, "interrupted; the same command goes on where it was")
    except (POSError, OSError) as error:
        _exit(1, f"{type(error).__name__}: {error}")


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    """``logger`` says nothing but the worst meanwhile."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Copy:
    """One run of the command."""

    def __init__(
        self,
        source: Any,
        destination: Any,
        without_blobs: bool,
        skips_missing_blobs: bool,
        quiet: bool,
    ):
        self._source = source
        self._destination = destination
        self._without_blobs = without_blobs
        self._skips_missing_blobs = skips_missing_blobs
        self._missing_blobs = 0
        # Records that may belong to blobs for all that can be told.
        self._wrapped = 0
        self._quiet = quiet
        self._is_interrupted = False
        self._last = source.lastTransaction()
        self._transactions = self._records = self._verified = 0
        self._keeps_blobs = (
            not without_blobs
            and IBlobStorage.providedBy(source)
            and IBlobStorageRestoreable.providedBy(destination)
        )

    def start(self, since: bytes | None) -> bytes:
        """The tid after which to copy; CopyError if the two do not go together."""
        have = self._destination.lastTransaction()
        if since is not None:
            if since < have:
                raise CopyError(
                    f"the destination has transactions up to {have.hex()} already, and"
                    f" only later ones can be appended: --since {have.hex()}"
                )
            return since
        if have != Z64 and not self._has(have):
            raise CopyError(
                f"the destination ends with transaction {have.hex()}, which is not in"
                " the source: it is no copy of it, or the source was packed. Copy to an"
                " empty destination, or say with --since what is to be appended"
            )
        return bytes(have)

    def copy(self, start: bytes) -> None:
        """Append what is later than ``start``."""
        was = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with (
                closing(self._after(self._source, start)) as transactions,
                self._progress("copying", start) as advance,
            ):

                def copied(transaction: Any) -> None:
                    self._transactions += 1
                    advance(transaction.tid)
                    self._stop_if_asked()

                copy_transactions(
                    transactions,
                    self._source,
                    self._destination,
                    copied,
                    self._before_record,
                    self._without_blob,
                    with_blobs=self._keeps_blobs,
                )
        finally:
            signal.signal(signal.SIGINT, was)

    def verify(self, start: bytes, *, all_of_it: bool) -> None:
        """Compare all that was copied; CopyError names the first difference.

        ``all_of_it``: and what was copied before. Raises _VerifyInterrupted.
        """
        try:
            self._verify(self._before_first() if all_of_it else start)
        except KeyboardInterrupt:
            raise _VerifyInterrupted from None

    def _before_first(self) -> bytes:
        """The tid before all that the destination has."""
        with closing(self._after(self._destination, Z64)) as transactions:
            first = next(transactions, None)
        return Z64 if first is None else preceding(first.tid)

    def _verify(self, start: bytes) -> None:
        end = self._destination.lastTransaction()
        with (
            closing(self._after(self._source, start, end)) as ours,
            closing(self._after(self._destination, start, end)) as theirs,
            self._progress("verifying", start) as advance,
        ):
            for one, other in zip_longest(ours, theirs):
                self._compare(one, other)
                self._verified += 1
                advance(one.tid)

    def summary(self) -> None:
        """Say what was done."""
        if self._missing_blobs:
            click.echo(
                f"zeolith: {self._missing_blobs} blobs are not in the source, and not"
                " in the copy",
                err=True,
            )
        if self._wrapped:
            click.echo(
                f"zeolith: a wrapper has changed {self._wrapped} records: if some of"
                " them belong to blobs, these are not in the copy",
                err=True,
            )
        if not self._quiet:
            click.echo(
                f"{self._transactions} transactions and {self._records} records copied,"
                f" {self._verified} transactions verified",
                err=True,
            )

    def _has(self, tid: bytes) -> bool:
        with closing(self._source.iterator(tid, tid)) as found:
            return any(each.tid == tid for each in found)

    def _after(
        self, storage: Any, start: bytes, stop: bytes | None = None
    ) -> "_Iteration":
        first = None if start == Z64 else following(start)
        return _Iteration(storage.iterator(first, stop), stop)

    def _before_record(self, record: Any) -> None:
        self._stop_if_asked()
        if not self._keeps_blobs and not self._without_blobs:
            if self._has_blob(record):
                raise CopyError(
                    f"transaction {record.tid.hex()} has a blob, and source or"
                    " destination is without a blob directory; --without-blobs copies"
                    " the rest"
                )
            self._wrapped += is_wrapped(record)
        self._records += 1

    def _has_blob(self, record: Any) -> bool:
        """Whether it has; of one that nobody can look into, as far as it shows."""
        if is_blob_record(record.data):
            return True
        has_directory = IBlobStorage.providedBy(self._source)
        return has_directory and blob_of(self._source, record) is not None

    def _without_blob(self, record: Any) -> None:
        if not self._skips_missing_blobs:
            raise CopyError(
                f"the source has not got the blob of object {record.oid.hex()},"
                f" transaction {record.tid.hex()}: is its blob directory the right one?"
                " --skip-missing-blobs copies the rest"
            )
        self._missing_blobs += 1

    def _stop_if_asked(self) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt

    def _interrupt(self, _number: int, _frame: Any) -> None:
        """Ctrl-C: between two records; the second time at once."""
        self._stop_if_asked()
        self._is_interrupted = True

    def _compare(self, one: Any, other: Any) -> None:
        if one is None or other is None:
            which, found = ("destination", one) if one else ("source", other)
            raise CopyError(f"transaction {found.tid.hex()} is not in the {which}")
        if _described(one) != _described(other):
            raise CopyError(f"transaction {one.tid.hex()} is not the same in both")
        for record, copied in zip_longest(one, other):
            if (
                record is None
                or copied is None
                or (record.oid, record.data) != (copied.oid, copied.data)
                or not self._is_same_blob(record)
            ):
                oid = (record or copied).oid.hex()
                raise CopyError(
                    f"object {oid} of transaction {one.tid.hex()} is not the same in"
                    " both"
                )

    def _is_same_blob(self, record: Any) -> bool:
        if not self._keeps_blobs:
            return True
        try:
            ours = blob_of(self._source, record)
        except POSKeyError:
            # Whether that may be was asked when it was copied.
            return True
        if ours is None:
            return True
        try:
            theirs = self._destination.loadBlob(record.oid, record.tid)
        except POSKeyError:
            return False
        with open(ours, "rb") as one, open(theirs, "rb") as other:
            while True:
                piece = one.read(1024 * 1024)
                if piece != other.read(1024 * 1024):
                    return False
                if not piece:
                    return True

    def _progress(self, label: str, start: bytes) -> "_Progress":
        is_shown = not self._quiet and sys.stderr.isatty()
        return _Progress(label, start, self._last, is_shown)


class _Iteration:
    """Transactions up to ``stop``; each storage ends them in its own way."""

    def __init__(self, transactions: Any, stop: bytes | None):
        self._transactions = transactions
        self._iterator = iter(transactions)
        self._stop = stop

    def __iter__(self) -> "_Iteration":
        return self

    def __next__(self) -> Any:
        found = next(self._iterator)
        if self._stop is not None and found.tid > self._stop:
            raise StopIteration
        return found

    def close(self) -> None:
        close: Callable[[], None] | None = getattr(self._transactions, "close", None)
        if close is not None:
            close()


class _Progress:
    """A bar on a terminal; how far it is, the time of the transactions says."""

    def __init__(self, label: str, start: bytes, end: bytes, is_shown: bool):
        self._label = label
        self._start: int | None = None if start == Z64 else _minute(start)
        self._end = _minute(end)
        self._is_shown = is_shown
        self._bar: Any = None
        self._done = 0

    def __enter__(self) -> Callable[[bytes], None]:
        return self._advance if self._is_shown else lambda _tid: None

    def __exit__(self, *_exc_info: object) -> None:
        if self._bar is not None:
            self._bar.render_finish()

    def _advance(self, tid: bytes) -> None:
        if self._start is None:
            self._start = _minute(tid)
        if self._bar is None:
            length = max(1, self._end - self._start)
            self._bar = click.progressbar(
                length=length, label=self._label, file=sys.stderr
            )
            self._bar.render_progress()
        done = _minute(tid) - self._start
        if done > self._done:
            self._bar.update(done - self._done)
            self._done = done


def _minute(tid: bytes) -> int:
    return int.from_bytes(tid[:6], "big")


def _described(transaction: Any) -> tuple[Any, ...]:
    extension = getattr(transaction, "extension_bytes", None)
    return (
        transaction.tid,
        transaction.status,
        transaction.user,
        transaction.description,
        extension if isinstance(extension, bytes) else transaction.extension,
    )


def _tid(text: str) -> bytes:
    """The tid that ``text`` is, or the last one before the time that it is."""
    digits = text.removeprefix("0x")
    if len(digits) == 16:
        try:
            return bytes.fromhex(digits)
        except ValueError:
            pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(
            f"--since {text!r} is neither a transaction id (16 hexadecimal digits) nor"
            " a time like 2026-11-21T10:00:00"
        ) from None
    try:
        moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
        seconds = moment.second + moment.microsecond / 1e6
        return bytes(TimeStamp(*moment.timetuple()[:5], seconds).raw())
    except (ValueError, OverflowError):
        raise click.UsageError(
            f"--since {text!r}: transactions have times after 1900"
        ) from None


# Opening


def _opened(place: str, stack: ExitStack, *, is_source: bool) -> Any:
    """The storage at ``place``, closed with ``stack``; raises CopyError."""
    try:
        if "://" in place:
            storage = _from_uri(place)
        elif mistake := _mistake_of(place, is_source):
            raise CopyError(f"{place}: {mistake}")
        elif _is_data_file(place):
            storage = _File(place) if is_source else FileStorage(place)
        else:
            storage = _from_configuration(place)
    except CopyError:
        raise
    except LockError as error:
        raise CopyError(
            f"{place}: another process has it open; is it served? Then copy to the"
            " server"
        ) from error
    except FileStorageFormatError as error:
        raise CopyError(f"{place}: it is not a Data.fs") from error
    except (*_MISTAKES, KeyError, ZConfig.ConfigurationError) as error:
        raise CopyError(f"{place}: {_line(error)}") from error
    stack.callback(storage.close)
    if not isinstance(storage, _File) and not IStorageIteration.providedBy(storage):
        raise CopyError(f"{place}: the storage cannot list its transactions")
    return storage


def _mistake_of(place: str, is_source: bool) -> str | None:
    """What is wrong with ``place`` as it is written."""
    name, hash_, _rest = place.partition("#")
    path = Path(name)
    if path.is_socket() or (not path.exists() and _ADDRESS.fullmatch(place)):
        return (
            "it is the address of a server; write"
            f" zeolith://{os.path.abspath(path) if path.is_socket() else place}"
            "?storage=NAME, or for a file of that name a path with a slash"
        )
    if not path.exists() and (is_source or hash_ or path.suffix in _NO_DATA_FILES):
        return "there is no such file"
    if hash_ and path.is_file() and _is_data_file(name):
        return f"{name} is a Data.fs, which has no storages by name"
    return None


def _is_data_file(place: str) -> bool:
    path = Path(place)
    if not path.exists():
        return "#" not in place
    with path.open("rb") as file:
        start = file.read(4)
    return not start or start[:2] == b"FS" or place.endswith(".fs")


def _from_uri(place: str) -> Any:
    factory, _arguments = resolve_uri(place)
    return factory()


def _from_configuration(place: str) -> Any:
    path, _hash, name = place.partition("#")
    schema = ZConfig.loadSchemaFile(io.StringIO(_STORAGES))
    try:
        document, _handlers = ZConfig.loadConfig(schema, str(Path(path).resolve()))
    except ZConfig.ConfigurationError as error:
        if "unknown type name: 'zeolith'" not in str(error):
            raise
        raise CopyError(
            f"{place}: the section <zeolith> needs %import zeolith.client; if this is a"
            " server's configuration, copy from or to the server:"
            " zeolith://ADDRESS?storage=NAME"
        ) from error
    found = {}
    for database in document.databases:
        found[database.name or ""] = database.config.storage
    for storage in document.storages:
        found[storage.name or ""] = storage
    if not found:
        raise CopyError(f"{path}: there is no storage in it")
    if name and name not in found:
        raise CopyError(f"{path}: there is no storage {name!r}, only {_names(found)}")
    factory = found[name] if name else next(iter(found.values()))
    return factory.open()


def _names(found: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in found)


def _line(error: BaseException) -> str:
    text = " ".join(str(getattr(error, "message", None) or error).split())
    return text or type(error).__name__


def _exit(code: int, text: str) -> NoReturn:
    click.echo(f"zeolith: {' '.join(text.split())}", err=True)
    sys.exit(code)
