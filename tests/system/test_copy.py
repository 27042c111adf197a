"""`zeolith copy` as one moves a database to a server that asks who comes, and back."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import transaction
import ZODB
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage

from zeolith.server.access import parse_grants
from zeolith.server.key_files import add_user, create_token

from ..support.certificates import Authority
from ..support.commanding import complaint, zeolith
from ..support.serving import ServerProcess

PASSWORD = "correct horse battery"
TRANSACTIONS = 10


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The files of a server that knows an operator and others, and of clients."""
    monkeypatch.delenv("ZEOLITH_TOKEN", raising=False)
    monkeypatch.delenv("ZEOLITH_PASSWORD", raising=False)
    (tmp_path / "password").write_text(PASSWORD + "\n")
    for name, role in (("root", "admin"), ("ann", "write")):
        add_user(tmp_path / "users", name, PASSWORD, parse_grants(role))
    for name, role in (("admin", "admin"), ("read", "read")):
        token = create_token(tmp_path / "tokens", "", parse_grants(role), None, 0.0)
        (tmp_path / f"{name}.token").write_text(token)
    Authority(tmp_path).sign()
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[ServerProcess]:
    options = (
        "<tls>\ncertificate server.pem\n</tls>\n"
        "<access>\nusers users\ntokens tokens\n</access>"
    )
    storages = "<filestorage 1>\npath Served.fs\nblob-dir served\n</filestorage>"
    with ServerProcess(folder, options=options, storages=storages) as server:
        yield server
    assert PASSWORD not in server.stderr_text()


@pytest.fixture
def source(folder: Path) -> str:
    """The URI of a database with some history and blobs."""
    path, blobs = folder / "Source.fs", folder / "source"
    database = ZODB.DB(FileStorage(str(path), blob_dir=str(blobs)))
    connection = database.open()
    root = connection.root()
    for n in range(TRANSACTIONS):
        root["n"] = n
        root[f"blob{n}"] = Blob(b"blob %d" % n)
        transaction.get().note(f"the number {n}")
        transaction.commit()
    connection.close()
    database.close()
    return f"file://{path}?blobstorage_dir={blobs}"


def uri(server: ServerProcess, folder: Path, cache: str, who: str) -> str:
    """Of the server, for a client with the blobs in ``cache``."""
    host, port = server.address
    ca, blobs = quote(str(folder / "ca.pem")), quote(str(folder / cache))
    return f"zeolith://{host}:{port}?tls_ca={ca}&blob_dir={blobs}{who}"


def password(folder: Path, name: str) -> str:
    return f"&username={name}&password_file={quote(str(folder / 'password'))}"


def token(folder: Path, name: str) -> str:
    return f"&token_file={quote(str(folder / f'{name}.token'))}"


@pytest.mark.parametrize("way", ["password", "token"])
def test_a_database_moves_to_a_server_that_asks_who_comes_and_back(
    server, folder, source, way
):
    writer, reader = {
        "password": (password(folder, "root"), password(folder, "ann")),
        "token": (token(folder, "admin"), token(folder, "read")),
    }[way]
    there = uri(server, folder, "to", writer)
    done = zeolith("copy", source, there)
    copied = (
        f"{TRANSACTIONS + 1} transactions and {2 * TRANSACTIONS + 1} records copied"
    )
    assert done.returncode == 0, done.stderr
    assert copied in done.stderr

    # Whoever may read may take a copy.
    path, blobs = folder / "Back.fs", folder / "back"
    back = f"file://{path}?blobstorage_dir={blobs}"
    done = zeolith("copy", uri(server, folder, "from", reader), back)
    assert done.returncode == 0, done.stderr
    assert copied in done.stderr
    assert path.read_bytes() == (folder / "Source.fs").read_bytes()
    database = ZODB.DB(FileStorage(str(path), blob_dir=str(blobs)))
    with database.transaction() as connection:
        root = connection.root()
        assert root["n"] == TRANSACTIONS - 1
        for n in range(TRANSACTIONS):
            with root[f"blob{n}"].open() as file:
                assert file.read() == b"blob %d" % n
    database.close()


def test_who_is_no_admin_copies_nothing_into_a_server(server, folder, source):
    for who in (password(folder, "ann"), token(folder, "read")):
        done = zeolith("copy", "--quiet", source, uri(server, folder, "to", who))
        assert done.returncode == 1
        assert "admin" in complaint(done) or "read-only" in complaint(done)
        assert PASSWORD not in done.stderr
    done = zeolith("copy", source, uri(server, folder, "to", ""))
    assert done.returncode == 1
    assert "anonymous has no role" in complaint(done)
