"""From a configuration section to an open database, or to one line of what is wrong."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ZConfig
import ZODB.config
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ReadOnlyError

from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.filestore import FileStore
from zeolith.storage.opening import OpeningError, open_database, open_file
from zeolith.storage.tids import MAX_TID

from .transactions import A, plain, store, transaction

ROOT = os.geteuid() == 0


def factory(section: str) -> Any:
    """What ZConfig makes of a storage section."""
    config, _handler = ZConfig.loadConfigFile(
        ZODB.config.getStorageSchema(), io.StringIO(section)
    )
    return config.storage


@pytest.fixture
def open_section() -> Iterator[Callable[..., AdaptedStorage]]:
    opened = []

    def open_section(section: str, *, is_read_only: bool = False) -> AdaptedStorage:
        database = open_database("main", factory(section), is_read_only=is_read_only)
        opened.append(database)
        return database

    yield open_section
    for database in opened:
        database.close()


def filestorage(path: Path, *options: str) -> str:
    lines = "\n".join(options)
    return f"<filestorage>\npath {path}\n{lines}\n</filestorage>"


def mistake(section: str, **options: Any) -> str:
    with pytest.raises(OpeningError) as raised:
        open_database(
            "main", factory(section), is_read_only=options.get("is_read_only", False)
        )
    message = str(raised.value)
    assert message.startswith("storage main: ")
    assert "\n" not in message
    return message


def make_data(path: Path) -> None:
    store_ = FileStore("1", str(path))
    store_.vote(transaction(store(A, plain(1))))
    store_.finish()
    store_.close()


def test_a_filestorage_is_ours(open_section, tmp_path):
    database = open_section(filestorage(tmp_path / "Data.fs"))
    assert type(database) is FileStore
    assert database.name == "main"
    assert (tmp_path / "Data.fs").exists()
    assert (tmp_path / "Data.fs.zeolith").exists()


def test_a_filestorage_has_the_options_of_its_section(open_section, tmp_path):
    database = open_section(
        filestorage(
            tmp_path / "Data.fs", "quota 10MB", "pack-gc no", "pack-keep-old no"
        )
    )
    assert isinstance(database, FileStore)
    file = database._file
    assert file._quota == 10 * 1024**2
    assert file._pack_gc is False
    assert file.pack_keep_old is False


def test_a_read_only_section_is_read_only(open_section, tmp_path):
    make_data(tmp_path / "Data.fs")
    database = open_section(filestorage(tmp_path / "Data.fs", "read-only yes"))
    assert database.is_read_only
    with pytest.raises(ReadOnlyError):
        database.vote(transaction())


def test_a_read_only_server_opens_a_file_read_only(open_section, tmp_path):
    make_data(tmp_path / "Data.fs")
    # Somebody else may write meanwhile.
    writer = FileStore("1", str(tmp_path / "Data.fs"))
    database = open_section(filestorage(tmp_path / "Data.fs"), is_read_only=True)
    assert database.is_read_only
    assert database.load(A, MAX_TID)
    assert database.database_id == writer.database_id
    writer.close()


@pytest.mark.parametrize(
    "section", ["<mappingstorage>\n</mappingstorage>", "<demostorage>\n</demostorage>"]
)
def test_any_other_storage_is_adapted(open_section, section):
    one, other = open_section(section), open_section(section)
    assert type(one) is AdaptedStorage
    assert len(one.database_id) == 16
    assert one.database_id != other.database_id


def test_a_filestorage_with_a_packer_of_its_own_is_adapted(open_section, tmp_path):
    """A packer replaces the file in a way of its own."""
    packer = "ZODB.FileStorage:FileStorage.packer"
    database = open_section(filestorage(tmp_path / "Data.fs", f"packer {packer}"))
    assert type(database) is AdaptedStorage


def test_a_filestorage_in_a_demostorage_is_zodbs(open_section, tmp_path):
    make_data(tmp_path / "Data.fs")
    section = f"<demostorage>\n{filestorage(tmp_path / 'Data.fs')}\n</demostorage>"
    database = open_section(section)
    assert type(database) is AdaptedStorage
    assert database.load(A, MAX_TID)


# Mistakes


def test_a_file_that_another_process_has_open(tmp_path):
    writer = FileStorage(str(tmp_path / "Data.fs"))
    message = mistake(filestorage(tmp_path / "Data.fs"))
    assert "another process has it open" in message
    assert "Data.fs.lock" in message
    writer.close()


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "Data.fs").mkdir()
    assert "Data.fs" in mistake(filestorage(tmp_path / "Data.fs"))


def test_a_file_that_is_not_there_to_read(tmp_path):
    message = mistake(filestorage(tmp_path / "Data.fs"), is_read_only=True)
    assert message.endswith("Data.fs is not there to read")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"x", b"FS2", b"FS21" + bytes(100), b"text" * 999])
def test_a_file_that_is_something_else(tmp_path, content):
    (tmp_path / "Data.fs").write_bytes(content)
    message = mistake(filestorage(tmp_path / "Data.fs"))
    assert message.endswith("Data.fs is not a Data.fs")
    assert (tmp_path / "Data.fs").read_bytes() == content


def test_a_file_that_is_damaged(tmp_path):
    make_data(tmp_path / "Data.fs")
    (tmp_path / "Data.fs.index").unlink()
    data = bytearray((tmp_path / "Data.fs").read_bytes())
    # The length of the first transaction, and its repetition behind it.
    data[12:20] = (3).to_bytes(8, "big")
    data[-8:] = (100).to_bytes(8, "big")
    (tmp_path / "Data.fs").write_bytes(data)
    assert "Data.fs" in mistake(filestorage(tmp_path / "Data.fs"), is_read_only=False)


def test_a_damaged_identity(tmp_path):
    make_data(tmp_path / "Data.fs")
    (tmp_path / "Data.fs.zeolith").write_text("{")
    assert "Data.fs.zeolith is damaged" in mistake(filestorage(tmp_path / "Data.fs"))
    (tmp_path / "Data.fs.zeolith").unlink()
    # And the file was let go.
    FileStore("1", str(tmp_path / "Data.fs")).close()


@pytest.mark.skipif(ROOT, reason="nothing is forbidden to root")
def test_a_file_that_may_not_be_read(tmp_path):
    make_data(tmp_path / "Data.fs")
    (tmp_path / "Data.fs").chmod(0)
    assert "Permission denied" in mistake(filestorage(tmp_path / "Data.fs"))


def test_a_storage_of_a_package_that_is_not_installed():
    class Missing:
        name = None

        def open(self) -> Any:
            raise ImportError("No module named 'relstorage'")

    with pytest.raises(OpeningError, match="storage 2: No module named 'relstorage'"):
        open_database("2", Missing(), is_read_only=False)


def test_an_error_of_many_lines_is_told_in_one():
    class Talkative:
        def open(self) -> Any:
            raise ValueError("first\n  second\n")

    with pytest.raises(OpeningError, match=r"^storage 2: first second$"):
        open_database("2", Talkative(), is_read_only=False)


# The quick form


def test_a_file_is_opened_by_its_path(tmp_path):
    database = open_file("1", str(tmp_path / "Data.fs"), None)
    assert isinstance(database, FileStore)
    assert database.name == "1"
    database.close()


def test_a_blob_directory_is_made(tmp_path):
    database = open_file("1", str(tmp_path / "Data.fs"), str(tmp_path / "blobs"))
    assert (tmp_path / "blobs").is_dir()
    database.close()


def test_a_folder_that_is_not_there(tmp_path):
    path = str(tmp_path / "nowhere" / "Data.fs")
    with pytest.raises(OpeningError, match=f"^{path}: .*No such file or directory"):
        open_file("1", path, None)


def test_mistakes_of_the_quick_form_name_the_path(tmp_path):
    path = tmp_path / "Data.fs"
    path.write_text("something else")
    with pytest.raises(OpeningError, match=f"^{path}: .* is not a Data.fs$"):
        open_file("1", str(path), None)
    path.unlink()
    writer = FileStorage(str(path))
    with pytest.raises(OpeningError, match=f"^{path}: another process has it open"):
        open_file("1", str(path), None)
    writer.close()
