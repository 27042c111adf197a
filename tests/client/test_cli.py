"""``zeolith copy``, as a program and (where it must be stopped) as a function."""

import errno
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ZODB.blob import BlobStorageMixin
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.tests.hexstorage import HexStorage

from zeolith.client import cli
from zeolith.client.cli import _Copy, copy
from zeolith.client.copying import copy_transactions, transactions_of
from zeolith.storage.tids import Z64

from ..support.commanding import complaint, zeolith
from ..support.ids import number
from ..support.inprocess import InProcessServer, client_of, serving
from .test_copying import commit, everything, filled

A = number(1)
BLOB_RECORD = b"\x80\x03cZODB.blob\nBlob\nq\x01.\x80\x03N."
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "source.fs"
    filled(path).close()
    return str(path)


@pytest.fixture
def destination(tmp_path: Path) -> str:
    return str(tmp_path / "destination.fs")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    with serving(tmp_path / "served.fs") as server:
        yield server


def uri(server: InProcessServer) -> str:
    host, port = server.address
    return f"zeolith://{host}:{port}"


def contents(path: str) -> Any:
    storage = FileStorage(path, read_only=True)
    try:
        return everything(storage)
    finally:
        storage.close()


def copied(*arguments: str) -> Result:
    return CliRunner().invoke(copy, arguments)


def test_who_runs_it_in_a_program_logs_as_before(source, destination):
    loggers = [logging.getLogger(name) for name in ("zc.lockfile", "ZODB.FileStorage")]
    before = [logger.level for logger in loggers]
    assert copied(source, destination).exit_code == 0
    assert [logger.level for logger in loggers] == before


def test_the_program_copies_a_file_to_a_file(source, destination):
    done = zeolith("copy", source, destination)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == (
        "6 transactions and 105 records copied, 6 transactions verified\n"
    )
    assert contents(destination) == contents(source)


def test_it_copies_to_a_server_and_back(source, destination, server):
    assert copied(source, uri(server)).exit_code == 0
    assert copied(uri(server), destination).exit_code == 0
    assert contents(destination) == contents(source)


def test_it_copies_from_and_to_what_a_configuration_names(
    tmp_path, source, destination
):
    configuration = tmp_path / "zodb.conf"
    configuration.write_text(f"""
    <zodb main>
      <filestorage>
        path {destination}
      </filestorage>
    </zodb>
    <filestorage old>
      path {source}
    </filestorage>
    """)
    done = copied(f"{configuration}#old", f"{configuration}#main", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    assert contents(destination) == contents(source)
    done = copied(f"{configuration}#new", destination)
    assert done.exit_code == 1
    assert "there is no storage 'new', only 'main', 'old'" in done.output


def test_it_copies_a_file_that_is_being_served(server, destination):
    with client_of(server) as storage:
        commit(storage, A, b"data")
        done = copied(server.database._storage._file_name, destination)
        assert done.exit_code == 0, done.output
        assert contents(destination) == everything(storage)


def test_it_goes_on_after_the_last_transaction_of_the_destination(source, destination):
    assert copied(source, destination).exit_code == 0
    storage = FileStorage(source)
    commit(storage, number(7), b"later")
    storage.close()
    done = copied(source, destination)
    assert "1 transactions and 1 records copied, 1 transactions" in done.output
    assert contents(destination) == contents(source)
    assert "0 transactions and 0 records copied" in copied(source, destination).output


def test_a_destination_that_is_no_copy_is_refused(source, destination):
    other = FileStorage(destination)
    tid = commit(other, A, b"other")
    other.close()
    done = copied(source, destination)
    assert done.exit_code == 1
    assert done.output.startswith(
        f"zeolith: the destination ends with transaction {tid.hex()}, which is not in"
    )


def test_since_says_where_to_begin(source, destination):
    tids = [each[0][0] for each in contents(source)]
    done = copied(source, destination, "--since", tids[3].hex())
    assert "2 transactions" in done.output, done.output
    assert contents(destination) == contents(source)[4:]
    done = copied(source, destination, "--since", tids[0].hex())
    assert done.exit_code == 1
    assert "only later ones can be appended" in done.output


def test_since_may_be_a_time(source, tmp_path):
    for since, count in (("2001-01-01T00:00:00", 6), ("2100-01-01 00:00Z", 0)):
        done = copied(source, str(tmp_path / f"{count}.fs"), "--since", since)
        assert f"{count} transactions" in done.output, done.output
    done = copied(source, str(tmp_path / "x.fs"), "--since", "yesterday")
    assert done.exit_code == 2
    assert "'yesterday' is neither" in done.output


@pytest.mark.parametrize("difference", ["data", "metadata", "missing"])
def test_a_copy_that_is_not_the_same_is_found(
    source, destination, monkeypatch, difference
):
    """Whatever went wrong: here the copying leaves out or changes something."""

    def wrong(transactions: Any, *args: Any, **named: Any) -> None:
        def changed() -> Iterator[Any]:
            for index, each in enumerate(transactions):
                if index == 3 and difference == "missing":
                    continue
                if index == 3 and difference == "metadata":
                    each.user = b"another"
                if index == 3 and difference == "data":
                    [record] = each
                    record.data = b"changed"
                    each = _Of(each, [record])
                yield each

        copy_transactions(changed(), *args, **named)

    monkeypatch.setattr(cli, "copy_transactions", wrong)
    done = copied(source, destination)
    assert done.exit_code == 1
    fourth = contents(source)[3][0][0].hex()
    assert f"transaction {fourth} is not" in done.output
    assert copied(source, destination + "2", "--no-verify").exit_code == 0


class _Of:
    """A transaction with other records."""

    def __init__(self, transaction: Any, records: list[Any]):
        self._transaction, self._records = transaction, records

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transaction, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._records)


def test_an_interrupted_copy_can_be_continued(source, destination, monkeypatch):
    def interrupted(transactions: Any, *args: Any, **named: Any) -> None:
        def until_the_third() -> Iterator[Any]:
            for index, each in enumerate(transactions):
                if index == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                yield each

        copy_transactions(until_the_third(), *args, **named)

    monkeypatch.setattr(cli, "copy_transactions", interrupted)
    done = copied(source, destination)
    assert done.exit_code == 130
    assert "the same command goes on where it was" in done.output
    assert contents(destination) == contents(source)[:3]
    monkeypatch.setattr(cli, "copy_transactions", copy_transactions)
    assert copied(source, destination).exit_code == 0
    assert contents(destination) == contents(source)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_blobs_are_not_lost_without_a_word(tmp_path, destination):
    path = tmp_path / "blobs.fs"
    storage = FileStorage(str(path))
    commit(storage, A, BLOB_RECORD)
    storage.close()
    done = copied(str(path), destination)
    assert done.exit_code == 1
    assert "has a blob" in done.output
    assert contents(destination) == []
    assert copied(str(path), destination, "--without-blobs").exit_code == 0
    assert contents(destination) == contents(str(path))


def test_an_interrupted_comparison_is_made_up_for(source, destination, monkeypatch):
    whole = _Copy._compare

    def interrupted(self: Any, one: Any, other: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        whole(self, one, other)

    monkeypatch.setattr(_Copy, "_compare", interrupted)
    done = copied(source, destination)
    assert done.exit_code == 130
    assert "not all of it is compared: --verify-all does that" in done.output
    monkeypatch.setattr(_Copy, "_compare", whole)
    assert "copied, 0 transactions verified" in copied(source, destination).output
    done = copied("--verify-all", source, destination)
    assert "0 records copied, 6 transactions verified" in done.output
    later = copied(
        "--since", contents(source)[2][0][0].hex(), source, destination + "2"
    )
    assert later.exit_code == 0
    done = copied("--verify-all", source, destination + "2")
    assert "0 records copied, 3 transactions verified" in done.output
    done = copied("--verify-all", source, destination + "3", "--no-verify")
    assert done.exit_code == 2


def test_all_is_compared_if_it_is_asked_for(source, destination):
    assert copied(source, destination).exit_code == 0
    data = Path(destination).read_bytes()
    Path(destination).write_bytes(data.replace(b"description", b"DESCRIPTION"))
    assert copied(source, destination).exit_code == 0
    done = copied(source, destination, "--verify-all")
    assert done.exit_code == 1
    assert "is not the same in both" in done.output


@pytest.fixture
def blobs(tmp_path: Path) -> "Blobs":
    return Blobs(tmp_path)


class Blobs:
    """Storages with blob directories, by name; ``source`` has two blobs."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.fill("source", lambda storage: storage)

    def fill(self, name: str, wrapped: Callable[[Any], Any]) -> None:
        folder = self._folder
        storage = wrapped(self.open(name))
        commit(storage, number(3), b"no blob")
        for oid in (A, number(2)):
            path = folder / "uncommitted"
            path.write_bytes(b"blob" + oid)
            metadata = TransactionMetaData()
            storage.tpc_begin(metadata)
            storage.storeBlob(oid, Z64, BLOB_RECORD, str(path), "", metadata)
            storage.tpc_vote(metadata)
            storage.tpc_finish(metadata)
        storage.close()

    def open(self, name: str) -> FileStorage:
        path = str(self._folder / f"{name}.fs")
        return FileStorage(path, blob_dir=str(self._folder / name))

    def uri(self, name: str, blob_dir: str = "") -> str:
        blob_dir = blob_dir or name
        folder = self._folder
        return f"file://{folder}/{name}.fs?blobstorage_dir={folder}/{blob_dir}"

    def files(self, name: str) -> list[bytes]:
        found = (self._folder / name).rglob("*")
        return sorted(
            each.read_bytes()
            for each in found
            if each.is_file() and each.name != ".layout"
        )


def test_blobs_are_copied_and_compared(blobs):
    assert copied(blobs.uri("source"), blobs.uri("copy")).exit_code == 0
    assert blobs.files("copy") == [b"blob" + A, b"blob" + number(2)]


def test_a_copy_of_a_blob_that_is_not_the_same_is_found(blobs, tmp_path):
    assert copied(blobs.uri("source"), blobs.uri("copy")).exit_code == 0
    one, _other = (tmp_path / "copy").rglob("*.blob")
    one.chmod(0o600)
    one.write_bytes(b"another")
    done = copied(blobs.uri("source"), blobs.uri("copy"), "--verify-all")
    assert (done.exit_code, "is not the same in both" in done.output) == (1, True)
    one.unlink()
    done = copied(blobs.uri("source"), blobs.uri("copy"), "--verify-all")
    assert (done.exit_code, "is not the same in both" in done.output) == (1, True)


def test_a_blob_that_the_source_has_not_got_ends_the_copy(blobs):
    """It may be all of them: the blob directory is mistyped, or not mounted."""
    source, destination = blobs.uri("source", "elsewhere"), blobs.uri("copy")
    done = copied(source, destination)
    assert done.exit_code == 1
    assert "the source has not got the blob of object 0000000000000001" in done.output
    assert "is its blob directory the right one?" in done.output
    done = copied(source, destination, "--skip-missing-blobs")
    assert done.exit_code == 0
    assert "2 blobs are not in the source, and not in the copy" in done.output
    assert blobs.files("copy") == []


def test_blobs_are_copied_whose_records_nobody_can_look_into(blobs, tmp_path):
    blobs.fill("hidden", HexStorage)
    assert copied(blobs.uri("hidden"), blobs.uri("copy")).exit_code == 0
    assert blobs.files("copy") == [b"blob" + A, b"blob" + number(2)]
    done = copied(blobs.uri("hidden"), str(tmp_path / "bare.fs"))
    assert (done.exit_code, "has a blob" in done.output) == (1, True)
    done = copied(str(tmp_path / "hidden.fs"), str(tmp_path / "other.fs"))
    assert done.exit_code == 0
    assert "a wrapper has changed 3 records: if some of them belong" in done.output


def test_blobs_are_left_out_if_that_is_asked_for(blobs):
    done = copied(blobs.uri("source"), blobs.uri("copy"), "--without-blobs")
    assert done.exit_code == 0
    assert "3 transactions verified" in done.output
    assert blobs.files("copy") == []


@pytest.mark.parametrize("failing", ["copying", "storing"])
def test_no_part_of_a_blob_is_left_where_there_is_no_room(blobs, monkeypatch, failing):
    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "copying":
        monkeypatch.setattr("shutil.copyfileobj", full)
    else:
        monkeypatch.setattr(BlobStorageMixin, "restoreBlob", full)
    done = copied(blobs.uri("source"), blobs.uri("copy"))
    assert (done.exit_code, "No space left" in done.output) == (1, True)
    assert blobs.files("copy") == []


def test_what_is_no_file_is_not_made(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for place, said in (
        ("127.0.0.1:8100", "write zeolith://127.0.0.1:8100?storage=NAME"),
        ("8100", "write zeolith://8100?storage=NAME"),
        ("server.conf", "there is no such file"),
        ("copy.fs#main", "there is no such file"),
        ("source.fs#main", "source.fs is a Data.fs, which has no storages by name"),
    ):
        done = copied(source, place)
        assert done.exit_code == 1
        assert said in done.output
    for since in ("yesterday", "1800-01-01"):
        assert copied("--since", since, source, "copy.fs").exit_code == 2
    assert sorted(tmp_path.iterdir()) == before


def test_the_address_of_a_socket_is_known(tmp_path, source):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        done = copied(source, path)
    assert done.exit_code == 1
    assert f"write zeolith://{path}?storage=NAME" in done.output


def test_the_configuration_of_a_server_is_no_place(tmp_path, destination):
    configuration = tmp_path / "server.conf"
    configuration.write_text("<zeolith>\n</zeolith>\n<mappingstorage/>\n")
    done = copied(str(configuration), destination)
    assert done.exit_code == 1
    assert "copy from or to the server: zeolith://ADDRESS" in done.output


def test_an_operators_mistake_is_one_line(tmp_path, source, destination, server):
    junk = tmp_path / "junk"
    junk.write_text("this is no configuration")
    served = server.database._storage._file_name
    for arguments, said in (
        (["nowhere.fs", destination], "nowhere.fs: there is no such file"),
        ([str(junk), destination], f"{junk}: "),
        ([source, served], "another process has it open; is it served?"),
        (["zeolith://127.0.0.1:1?wait_timeout=0.1", destination], "zeolith://"),
        (["nothing://x", destination], "nothing://x: "),
        ([source, str(tmp_path / "no" / "folder.fs")], "No such file"),
    ):
        done = copied(*arguments)
        assert done.exit_code == 1
        [line] = done.output.splitlines()
        assert line.startswith("zeolith: ")
        assert said in line
    assert "no such file" in complaint(zeolith("copy", "nowhere.fs", destination))


def test_the_progress_is_shown_on_a_terminal(source, destination, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as ended:
        copy.main([source, destination])
    assert ended.value.code == 0
    said = capsys.readouterr().err
    assert "copying" in said
    assert "verifying" in said


def test_an_iterator_is_closed_whatever_happens(source):
    storage = FileStorage(source, read_only=True)
    with transactions_of(storage) as transactions:
        next(transactions)
    assert transactions._file is None
    storage.close()
