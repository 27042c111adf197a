"""ZODB's reusable blob suite over a server, with a cache and with a shared directory.

One server process has as many storages as the suites may want; each storage that a
test asks for is one that nobody has used.
"""

import doctest
import os
import unittest
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from ZODB.blob import Blob
from ZODB.config import storageFromString
from ZODB.DB import DB
from ZODB.interfaces import IBlobStorage, IBlobStorageRestoreable
from ZODB.tests.testblob import storage_reusable_suite

from zeolith.client.storage import ClientStorage
from zeolith.client.uri import resolver

from ..support.serving import ServerProcess
from .served import stop_without_complaints

STORAGES = 80
# Of each kind that has blobs.
OTHERS = """
<blobstorage wrapped>
  blob-dir wrapped.blobs
  <filestorage>
    path wrapped.fs
  </filestorage>
</blobstorage>
<demostorage demo>
</demostorage>
<demostorage over>
  <filestorage>
    path over.fs
    blob-dir over.blobs
  </filestorage>
</demostorage>
"""
FILESTORAGE = """\
<filestorage {name}>
  path {name}.fs
  blob-dir {name}.blobs
</filestorage>
"""


class Storages:
    """The server of this module, and the clients that a test has opened."""

    server: ClassVar[ServerProcess]
    unused: ClassVar[Iterator[str]]
    opened: ClassVar[list[ClientStorage]] = []

    @classmethod
    def cached(cls, _name: str, blob_dir: str) -> ClientStorage:
        return cls._open(next(cls.unused), blob_dir=blob_dir)

    @classmethod
    def shared(cls, _name: str, _blob_dir: str) -> ClientStorage:
        name = next(cls.unused)
        directory = cls.server.directory / f"{name}.blobs"
        return cls._open(name, blob_dir=str(directory), shared_blob_dir=True)

    @classmethod
    def _open(cls, name: str, **options: Any) -> ClientStorage:
        storage = ClientStorage(cls.server.address, storage=name, **options)
        cls.opened.append(storage)
        return storage


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    names = [f"s{number}" for number in range(STORAGES)]
    sections = "".join(FILESTORAGE.format(name=name) for name in names)
    Storages.unused = iter(names)
    sections += OTHERS
    server = ServerProcess(tmp_path_factory.mktemp("blobs"), storages=sections)
    Storages.server = server
    with server:
        yield server
        stop_without_complaints(server)


def cases(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for each in suite:
        if isinstance(each, unittest.TestSuite):
            yield from cases(each)
        else:
            yield each


CACHED = storage_reusable_suite(
    "Cached", Storages.cached, test_undo=True, test_blob_storage_recovery=True
)
SHARED = storage_reusable_suite(
    "Shared",
    Storages.shared,
    test_undo=True,
    test_packing=True,
    test_blob_storage_recovery=True,
)


# Where a FileStorage has its temporary files.
THEIR_DIRECTORY = ("os.path.join(blob_dir, 'tmp')", "blob_storage.temporaryDirectory()")


def is_for_us(example: doctest.Example) -> bool:
    # Nothing is forbidden to root.
    return os.geteuid() != 0 or "open(blob.committed(), 'w')" not in example.source


def without_theirs(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    """The tests but one, which lets every os.rename of the process fail.

    It means that uncommitted files come from another file system, and that they are
    copied then; for us tests/client/test_blobs.py says that.
    """
    return [
        case for case in cases(suite) if "commit_from_wrong_partition" not in case.id()
    ]


def name_of(case: unittest.TestCase) -> str:
    return case.id().rpartition("/")[2].removeprefix("ZODB.tests.testblob.")


@pytest.mark.parametrize("case", without_theirs(CACHED), ids=name_of)
def test_a_blob_in_a_cache_is_a_blob(case):
    run(case)


@pytest.mark.parametrize("case", without_theirs(SHARED), ids=name_of)
def test_a_blob_in_a_shared_directory_is_a_blob(case):
    run(case)


def run(case: unittest.TestCase) -> None:
    if isinstance(case, doctest.DocTestCase):
        examples = case._dt_test.examples  # type: ignore[attr-defined]
        examples[:] = (example for example in examples if is_for_us(example))
        for example in examples:
            example.source = example.source.replace(*THEIR_DIRECTORY)
    result = unittest.TestResult()
    try:
        case.run(result)
    finally:
        while Storages.opened:
            Storages.opened.pop().close()
    texts = [text for _case, text in (*result.failures, *result.errors)]
    assert not texts, "\n".join(texts)


@pytest.mark.parametrize("form", ["cached", "shared"])
def test_the_interfaces_are_declared(form, tmp_path):
    storage = getattr(Storages, form)("", str(tmp_path / "blobs"))
    assert IBlobStorage.providedBy(storage)
    assert IBlobStorageRestoreable.providedBy(storage)
    storage.close()


def test_the_interfaces_are_not_declared_without_a_directory():
    storage = Storages._open(next(Storages.unused))
    assert not IBlobStorage.providedBy(storage)
    storage.close()


@pytest.mark.parametrize("name", ["wrapped", "demo", "over"])
def test_every_storage_with_blobs_has_them_behind_a_server(name, tmp_path):
    for number, data in enumerate([b"one", bytes(3_000_000)]):
        writer = DB(Storages._open(name, blob_dir=str(tmp_path / "writer")))
        with writer.transaction() as connection:
            connection.root()[number] = Blob(data)
        writer.close()
        reader = DB(Storages._open(name, blob_dir=str(tmp_path / "reader")))
        with reader.transaction() as connection, connection.root()[number].open() as f:
            assert f.read() == data
        reader.close()


def test_a_file_and_a_uri_configure_blobs(tmp_path):
    host, port = Storages.server.address
    section = f"""
        %import zeolith.client
        <zeolith>
          server {host}:{port}
          storage {next(Storages.unused)}
          blob-dir {tmp_path / "section"}
          blob-cache-size 10MB
          blob-cache-size-check 20
        </zeolith>
        """
    uri = (
        f"zeolith://{host}:{port}?storage={next(Storages.unused)}"
        f"&blob_dir={tmp_path / 'uri'}&blob_cache_size=10MB"
    )
    factory, _arguments = resolver(uri)
    for storage in (storageFromString(section), factory()):
        database = DB(storage)
        with database.transaction() as connection:
            connection.root()["blob"] = Blob(b"data")
        assert storage.temporaryDirectory().startswith(str(tmp_path))
        database.close()
