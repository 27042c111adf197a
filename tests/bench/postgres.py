"""RelStorage's server: a PostgreSQL of its own, in a folder, on a Unix socket.

Everything has its default, fsync included, but for what is needed: the socket, more
connections than 100, and statistics of the tables that were just filled. PostgreSQL
refuses to run as root; then it runs as another user, who must be able to reach the
folder.
"""

import importlib.util
import logging
import os
import pwd
import shutil
import subprocess
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TextIO

from ZODB.FileStorage.FileStorage import FileStorage

PROGRAMS = ("initdb", "postgres")
# Who may run it in the place of root, the best first.
OWNERS = ("postgres", "nobody")
CONNECTIONS = 300
DATABASE_USER = "bench"
# A Unix socket's path may have 107 bytes.
SOCKET_PATH_BYTES_MAX = 107


class CannotRun(Exception):
    """PostgreSQL is there, but cannot run here."""


def missing() -> str:
    """What PostgreSQL or RelStorage lack here, in words; empty if nothing."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"PostgreSQL's {' and '.join(lacking)} in PATH"
    if importlib.util.find_spec("psycopg2") is None:
        return "the package psycopg2"
    if os.geteuid() == 0 and owner() is None:
        return "a user besides root for PostgreSQL"
    return ""


def owner() -> str | None:
    """Who is to run PostgreSQL; None is who we are."""
    if os.geteuid() != 0:
        return None
    for name in OWNERS:
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


def make_cluster(folder: Path, user: str | None, log: TextIO) -> None:
    """Make an empty cluster below ``folder``.

    Raises:
        CannotRun: The folder does not suit; the message says why.
    """
    cluster = _cluster(folder)
    if len(bytes(_socket(folder))) > SOCKET_PATH_BYTES_MAX:
        raise CannotRun(f"the path is too long for a socket: {_socket(folder)}")
    cluster.mkdir(mode=0o700)
    if user is not None:
        shutil.chown(cluster, user)
    command = ["initdb", "--pgdata", str(cluster), "--username", DATABASE_USER]
    command += ["--auth", "trust", "--no-locale", "--encoding", "UTF8", "--no-sync"]
    try:
        subprocess.run(
            command, check=True, stdout=log, stderr=log, cwd=folder, user=user
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = (folder / "log").read_text().strip()
        raise CannotRun(f"as user {user or 'of this process'}: {said or error}") from (
            error
        )


def command(folder: Path) -> list[str]:
    """How the server of the cluster in ``folder`` is started."""
    return [
        *("postgres", "-D", str(_cluster(folder)), "-k", str(_cluster(folder))),
        *("-c", "listen_addresses=", "-c", f"max_connections={CONNECTIONS}"),
    ]


def is_ready(folder: Path) -> bool:
    """Whether the server takes connections; it says so in its own file."""
    with suppress(OSError):
        return "ready" in (_cluster(folder) / "postmaster.pid").read_text()
    return False


def dsn(folder: Path) -> str:
    """What a client connects to."""
    return f"host='{_cluster(folder)}' user='{DATABASE_USER}' dbname='postgres'"


def open_storage(dsn: str) -> Any:
    """A RelStorage with defaults; its cache is empty."""
    from relstorage.adapters.postgresql import PostgreSQLAdapter
    from relstorage.options import Options
    from relstorage.storage import RelStorage

    options = Options()
    return RelStorage(PostgreSQLAdapter(dsn=dsn, options=options), options=options)


def fill(dsn: str, data: Path) -> None:
    """Copy a Data.fs into the empty database."""
    import psycopg2

    # It warns of an iterator without a length.
    logging.getLogger("relstorage").addHandler(logging.NullHandler())
    source = FileStorage(str(data), read_only=True)
    target = open_storage(dsn)
    target.copyTransactionsFrom(source)
    target.close()
    source.close()
    # It would come by itself, a minute later.
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("ANALYZE")
        connection.commit()


def _cluster(folder: Path) -> Path:
    return folder / "cluster"


def _socket(folder: Path) -> Path:
    return _cluster(folder) / ".s.PGSQL.5432"
