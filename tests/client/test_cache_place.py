"""The directory of cache files: one for each database, on a local disk only."""

import os
import stat
from pathlib import Path

import pytest

from zeolith.client import cache_place
from zeolith.client.cache_place import CachePlace, Identity, Presence, file_system_of

from ..support.gates import Background

SHOP, OTHER = Identity(b"s" * 16, 1), Identity(b"o" * 16, 1)


@pytest.fixture
def place(tmp_path: Path) -> CachePlace:
    return CachePlace(tmp_path / "a" / "cache")


def test_the_directory_is_made_and_is_its_owners(place):
    assert stat.S_IMODE(place.directory.stat().st_mode) & 0o077 == 0


def test_where_no_file_can_be_made_it_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        CachePlace(tmp_path / "file")


def test_each_database_and_epoch_has_a_file_of_its_own(place):
    paths = {place.path_of(each) for each in (SHOP, OTHER, Identity(b"s" * 16, 2))}
    assert len(paths) == 3
    for path in paths:
        path.write_text("")
    (place.directory / "notes.lmdb").write_text("")
    assert {path for _identity, path in place.files()} == paths


def test_what_was_used_last_is_known_for_each_storage(place):
    assert place.last("1") is None
    place.path_of(SHOP).write_text("")
    place.path_of(OTHER).write_text("")
    place.remember("1", SHOP)
    place.remember("a/b", OTHER)
    assert place.last("1") == SHOP
    assert place.last("a/b") == OTHER
    place.remember("1", OTHER)
    assert place.last("1") == OTHER


def test_what_was_removed_was_not_used_last(place):
    place.path_of(SHOP).write_text("")
    place.remember("1", SHOP)
    cache_place.remove(place.path_of(SHOP))
    assert place.last("1") is None


@pytest.mark.parametrize("text", ["", "../../etc/passwd", "nonsense", "\0"])
def test_a_mark_that_is_damaged_is_none(place, text):
    (place.directory / "1.last").write_text(text)
    assert place.last("1") is None


# Network file systems

MOUNTS = """\
21 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 21 0:27 / /net rw shared:1 - nfs4 server:/export rw
31 21 0:28 / /with\\040space rw - cifs //host/share rw
40 30 0:29 / /net/local rw - tmpfs tmpfs rw
41 21 0:30 / /twice rw - ext4 /dev/vdb rw
42 21 0:31 / /twice rw - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/cache", "ext4"),
        ("/net", "nfs4"),
        ("/net/a/b", "nfs4"),
        ("/network", "ext4"),
        ("/net/local/cache", "tmpfs"),
        ("/with space/cache", "cifs"),
        ("/twice/cache", "fuse.sshfs"),
    ],
)
def test_the_innermost_mount_says_what_file_system_it_is(tmp_path, path, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system_of(Path(path), mounts) == kind


def test_nobody_knows_where_there_is_no_list_of_mounts(tmp_path):
    assert file_system_of(tmp_path, tmp_path / "absent") == ""


def test_a_network_file_system_is_refused_and_the_reason_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_place, "file_system_of", lambda path: "nfs4")
    with pytest.raises(ValueError, match=r"network file system \(nfs4\).*local disk"):
        CachePlace(tmp_path)


# Presence


def test_who_comes_first_is_alone_and_the_next_one_is_not(tmp_path):
    path = tmp_path / "x.lmdb"
    first = Presence(path)
    assert first.is_alone
    first.stay()
    second = Presence(path)
    assert not second.is_alone
    assert second.is_trusted
    second.stay()
    synced: list[str] = []
    first.leave(lambda: synced.append("first"))
    second.leave(lambda: synced.append("second"))
    assert synced == ["second"]


def test_after_a_clean_end_it_is_trusted_in_another_run_of_the_machine(
    tmp_path, monkeypatch
):
    path = tmp_path / "x.lmdb"
    presence = Presence(path)
    presence.stay()
    presence.leave(lambda: None)
    monkeypatch.setattr(cache_place, "boot_id", lambda: b"another")
    assert Presence(path).is_trusted


def test_after_a_death_it_is_trusted_in_the_same_run_only(tmp_path, monkeypatch):
    path = tmp_path / "x.lmdb"
    monkeypatch.setattr(cache_place, "boot_id", lambda: b"this one")
    for boot, is_trusted in ((b"this one", True), (b"another", False)):
        presence = Presence(path)
        presence.stay()
        presence.abandon()
        monkeypatch.setattr(cache_place, "boot_id", lambda boot=boot: boot)
        presence = Presence(path)
        assert presence.is_trusted is is_trusted
        presence.abandon()
        monkeypatch.setattr(cache_place, "boot_id", lambda: b"this one")


def test_where_nobody_knows_the_run_of_the_machine_only_a_clean_end_counts(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cache_place, "boot_id", lambda: b"")
    path = tmp_path / "x.lmdb"
    presence = Presence(path)
    presence.stay()
    presence.abandon()
    presence = Presence(path)
    assert not presence.is_trusted
    presence.stay()
    presence.leave(lambda: None)
    assert Presence(path).is_trusted


def test_if_it_cannot_be_synced_the_end_was_not_clean(tmp_path, monkeypatch):
    path = tmp_path / "x.lmdb"
    presence = Presence(path)
    presence.stay()

    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        presence.leave(fail)
    monkeypatch.setattr(cache_place, "boot_id", lambda: b"another")
    again = Presence(path)
    assert again.is_alone
    assert not again.is_trusted


def test_the_run_of_the_machine_has_a_name_here():
    if not os.path.exists("/proc/sys/kernel/random/boot_id"):
        pytest.skip("there is no /proc of Linux")
    assert cache_place.boot_id() == cache_place.boot_id() != b""


# Verifying


def test_one_verifies_at_a_time(tmp_path):
    path = tmp_path / "x.lmdb"
    inside: list[str] = []
    with cache_place.verifying(path):
        inside.append("first")
        second = Background(lambda: enter(path, inside))
        assert not second.returns_soon()
        assert inside == ["first"]
    second.result()
    assert inside == ["first", "second"]


def test_who_was_stopped_meanwhile_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_place, "VERIFYING_WAIT_S", 0.1)
    inside: list[str] = []
    with cache_place.verifying(tmp_path / "x.lmdb"):
        enter(tmp_path / "x.lmdb", inside)
    assert inside == ["second"]


def enter(path: Path, inside: list[str]) -> None:
    with cache_place.verifying(path):
        inside.append("second")
