"""Garbage is collected across databases by zc.zodbdgc, through clients of a server."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import transaction
from persistent.mapping import PersistentMapping
from ZODB.config import databaseFromFile
from ZODB.DB import DB
from ZODB.POSException import POSKeyError

from ..support.scratch_venv import ROOT, NotInstallable, scratch_venv
from ..support.serving import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NAMES = ("main", "other")
STORAGES = "".join(
    f"<filestorage {name}>\npath {name}.fs\npack-gc false\n</filestorage>\n"
    for name in NAMES
)
CONFIGURATION = "%import zeolith.client\n" + "".join(
    f"""
<zodb {name}>
  <zeolith>
    server {{host}}:{{port}}
    storage {name}
  </zeolith>
</zodb>
"""
    for name in NAMES
)
GC_TIMEOUT_S = 120
# It looks at what is older than so many days.
TO_COME = "-1"


@pytest.fixture(scope="module")
def venv() -> Path:
    try:
        return scratch_venv(ROOT / "var" / "zodbdgc-venv", "zc.zodbdgc")
    except NotInstallable as error:
        pytest.skip(f"zc.zodbdgc cannot be installed: {error}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, storages=STORAGES) as server:
        yield server
        server.terminate()
        assert "Traceback" not in server.stderr_text()


@pytest.fixture
def configuration(server: ServerProcess, tmp_path: Path) -> Path:
    host, port = server.address
    path = tmp_path / "databases.conf"
    path.write_text(CONFIGURATION.format(host=host, port=port))
    return path


@pytest.fixture
def main(configuration: Path) -> Iterator[DB]:
    with configuration.open() as file:
        database = databaseFromFile(file)
    yield database
    for each in database.databases.values():
        each.close()


def is_there(database: DB, oid: bytes) -> bool:
    database.cacheMinimize()
    try:
        database.storage.load(oid)
    except POSKeyError:
        return False
    return True


def test_what_no_database_refers_to_is_deleted(venv, configuration, main):
    other = main.databases["other"]
    connection = main.open()
    here, there = connection.root(), connection.get_connection("other").root()
    kept_there, kept_here = PersistentMapping(), PersistentMapping()
    there["kept"], here["kept"] = kept_there, kept_here
    transaction.commit()
    kept_there["of main"], kept_here["of other"] = kept_here, kept_there
    garbage_here, garbage_there = PersistentMapping(), PersistentMapping()
    here["garbage"], there["garbage"] = garbage_here, garbage_there
    transaction.commit()
    garbage_here["cycle"], garbage_there["cycle"] = garbage_there, garbage_here
    # What is kept here is so by the other database alone.
    del here["garbage"], there["garbage"], here["kept"]
    transaction.commit()
    for database in (main, other):
        # What an old revision refers to is no garbage yet.
        database.pack()
    kept = [(main, kept_here._p_oid), (other, kept_there._p_oid)]
    garbage = [(main, garbage_here._p_oid), (other, garbage_there._p_oid)]
    assert all(is_there(*each) for each in kept + garbage)
    collected = subprocess.run(
        [venv / "bin" / "multi-zodb-gc", "--days", TO_COME, configuration],
        capture_output=True,
        text=True,
        timeout=GC_TIMEOUT_S,
        check=False,
    )
    assert collected.returncode == 0, collected.stderr
    main.storage.sync()
    for database in (main, other):
        database.storage.catch_up()
    assert all(is_there(*each) for each in kept)
    assert not any(is_there(*each) for each in garbage)
    connection.sync()
    assert connection.get(kept_here._p_oid)["of other"] is kept_there
    connection.close()
