"""A real application: two Zope processes on one server, used through the web."""

import random
from collections.abc import Iterator
from functools import partial

import pytest

from ..support.gates import Background
from ..support.scratch_venv import NotInstallable
from ..support.serving import ServerProcess
from ..support.waiting import wait_until
from ..support.zope_instance import Zope, environment

# To install Zope takes a minute or two, once.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FILES = "/manage_addProduct/OFSP/manage_addFile"
FOLDERS = "/manage_addProduct/OFSP/manage_addFolder"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server")) as server:
        yield server
        server.terminate()
        assert "Traceback" not in server.stderr_text()


@pytest.fixture(scope="module")
def zopes(tmp_path_factory, server) -> Iterator[tuple[Zope, Zope]]:
    try:
        venv = environment()
    except NotInstallable as error:
        pytest.skip(f"Zope cannot be installed: {error}")
    homes = [tmp_path_factory.mktemp("zopes") / name for name in ("one", "other")]
    one, other = (Zope(venv, home, server.address) for home in homes)
    with one.start(), other.start():
        yield one, other
    for zope in (one, other):
        # Zope logs conflicts, which it tries again, in a line; nothing else is right.
        assert "Traceback" not in zope.log_text(), zope.log_text()


def test_what_is_made_in_one_is_in_the_other(zopes):
    one, other = zopes
    one.post(FOLDERS, id="news", title="What is new")
    wait_until(lambda: other.has("/news/manage_main"), "the folder")
    assert b"What is new" in other.get("/news/manage_propertiesForm")


def test_a_file_goes_up_here_and_comes_down_there(zopes):
    one, other = zopes
    data = random.Random(1).randbytes(3_000_000)
    one.upload(FILES, data, id="upload.bin")
    wait_until(lambda: other.has("/upload.bin"), "the file")
    assert other.get("/upload.bin") == one.get("/upload.bin") == data


def test_what_is_edited_in_one_changes_in_the_other(zopes):
    one, other = zopes
    one.upload(FILES, b"first", id="note.txt", title="a note")
    wait_until(lambda: other.has("/note.txt"), "the file")
    assert other.get("/note.txt") == b"first"
    other.upload("/note.txt/manage_upload", b"second")
    wait_until(lambda: one.get("/note.txt") == b"second", "the second text")


def test_what_is_undone_in_one_is_undone_in_the_other(zopes):
    one, other = zopes
    one.upload(FILES, b"kept", id="undone.txt")
    one.upload("/undone.txt/manage_upload", b"a mistake")
    wait_until(
        lambda: other.has("/undone.txt") and other.get("/undone.txt") == b"a mistake",
        "the mistake",
    )
    newest = other.undoable()[0]
    assert "/undone.txt/manage_upload" in newest
    other.undo(newest)
    assert other.get("/undone.txt") == b"kept"
    wait_until(lambda: one.get("/undone.txt") == b"kept", "the undo")
    # And back: an undo can be undone.
    one.undo(one.undoable()[0])
    wait_until(lambda: other.get("/undone.txt") == b"a mistake", "the redo")


def test_what_is_deleted_in_one_is_gone_in_the_other(zopes):
    one, other = zopes
    one.post(FOLDERS, id="gone")
    wait_until(lambda: other.has("/gone/manage_main"), "the folder")
    other.post("/manage_delObjects", **{"ids:list": "gone"})
    wait_until(lambda: not one.has("/gone/manage_main"), "the end of the folder")


def test_both_write_to_one_folder_at_once(zopes):
    """Every addition changes the folder, so they conflict and are tried again."""
    one, other = zopes
    one.post(FOLDERS, id="busy")
    wait_until(lambda: other.has("/busy/manage_main"), "the folder")

    def fill(zope: Zope, name: str) -> None:
        for number in range(20):
            zope.upload(f"/busy{FILES}", b"%d" % number, id=f"{name}{number}")

    working = [
        Background(fill, zope, name) for zope, name in ((one, "a"), (other, "b"))
    ]
    for each in working:
        each.result()
    for zope in zopes:
        for name in ("a", "b"):
            last = f"/busy/{name}19"
            wait_until(partial(zope.has, last), "the last file")
            for number in range(20):
                assert zope.get(f"/busy/{name}{number}") == b"%d" % number


def test_a_server_that_was_restarted_is_found_again(server, zopes):
    one, other = zopes
    server.kill()
    server.start()
    one.upload(FILES, b"after", id="after.txt")
    wait_until(lambda: other.has("/after.txt"), "the file")
    assert other.get("/after.txt") == b"after"
