"""What a database is, beside its data."""

import json
import os
from pathlib import Path

import pytest

from zeolith.storage.identity import Identity, IdentityError


@pytest.fixture
def data_path(tmp_path: Path) -> str:
    return str(tmp_path / "Data.fs")


def beside(data_path: str) -> Path:
    return Path(f"{data_path}.zeolith")


def fields_of(data_path: str) -> dict[str, object]:
    fields: dict[str, object] = json.loads(beside(data_path).read_text())
    return fields


def test_a_database_gets_an_identity_and_keeps_it(data_path):
    identity = Identity(data_path)
    assert len(identity.database_id) == 16
    assert identity.epoch == 1
    again = Identity(data_path)
    assert again.database_id == identity.database_id
    assert again.epoch == 1
    assert again.oids_reserved == 0


def test_two_databases_are_two(tmp_path):
    one = Identity(str(tmp_path / "one.fs"))
    other = Identity(str(tmp_path / "other.fs"))
    assert one.database_id != other.database_id


def test_the_file_is_json_that_a_person_can_read(data_path):
    identity = Identity(data_path)
    identity.reserve_oids(255)
    assert fields_of(data_path) == {
        "database_id": identity.database_id.hex(),
        "epoch": 1,
        "oids_reserved": "00000000000000ff",
    }


def test_reserved_oids_are_remembered_before_they_are_used(data_path):
    identity = Identity(data_path)
    identity.reserve_oids(1000)
    assert Identity(data_path).oids_reserved == 1000


def test_fewer_than_are_reserved_need_no_write(data_path):
    identity = Identity(data_path)
    identity.reserve_oids(1000)
    beside(data_path).unlink()
    identity.reserve_oids(1000)
    identity.reserve_oids(999)
    assert not beside(data_path).exists()
    assert identity.oids_reserved == 1000


def test_unused_oids_are_given_back_at_a_clean_end(data_path):
    identity = Identity(data_path)
    identity.reserve_oids(1000)
    identity.return_oids(501)
    assert Identity(data_path).oids_reserved == 500


def test_used_oids_are_never_given_back(data_path):
    identity = Identity(data_path)
    identity.reserve_oids(1000)
    identity.return_oids(1001)
    identity.return_oids(2000)
    assert Identity(data_path).oids_reserved == 1000


def test_a_read_only_database_writes_nothing(data_path):
    identity = Identity(data_path, is_read_only=True)
    identity.return_oids(0)
    assert not beside(data_path).exists()


def test_a_read_only_database_has_the_identity_that_is_there(data_path):
    identity = Identity(data_path)
    identity.reserve_oids(1000)
    read_only = Identity(data_path, is_read_only=True)
    read_only.return_oids(1)
    assert read_only.database_id == identity.database_id
    assert read_only.oids_reserved == 1000
    assert Identity(data_path).oids_reserved == 1000


GOOD = {"database_id": "00" * 16, "epoch": 1, "oids_reserved": "0"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"text"',
        "\xff",
        json.dumps({}),
        json.dumps({**GOOD, "database_id": "00" * 15}),
        json.dumps({**GOOD, "database_id": "no hex"}),
        json.dumps({**GOOD, "database_id": None}),
        json.dumps({**GOOD, "database_id": 7}),
        json.dumps({**GOOD, "epoch": 0}),
        json.dumps({**GOOD, "epoch": None}),
        json.dumps({**GOOD, "epoch": "first"}),
        json.dumps({**GOOD, "epoch": float("inf")}),
        json.dumps({**GOOD, "epoch": float("nan")}),
        json.dumps({**GOOD, "oids_reserved": "-1"}),
        json.dumps({**GOOD, "oids_reserved": 7}),
        json.dumps({**GOOD, "oids_reserved": ""}),
        "[" * 100_000,
    ],
)
def test_a_damaged_file_stops_the_server_with_what_to_do(data_path, text):
    beside(data_path).write_text(text, encoding="latin-1")
    with pytest.raises(IdentityError, match=r"is damaged .* Restore it from a backup"):
        Identity(data_path)
    assert beside(data_path).read_text(encoding="latin-1") == text


def test_the_file_is_replaced_in_one_step(data_path, monkeypatch):
    """Whoever looks sees the old one or the new one, whole."""
    identity = Identity(data_path)
    seen = []
    synced: list[int] = []
    replace = Path.replace

    def watched_replace(self: Path, target: Path) -> Path:
        assert synced, "replaced before it was synced"
        seen.append(fields_of(data_path)["oids_reserved"])
        result = replace(self, target)
        seen.append(fields_of(data_path)["oids_reserved"])
        synced.clear()
        return result

    monkeypatch.setattr(Path, "replace", watched_replace)
    monkeypatch.setattr(os, "fsync", synced.append)
    identity.reserve_oids(1)
    assert seen == ["0" * 16, "0" * 15 + "1"]
    assert len(synced) == 1, "the directory is synced after the replacement"


def test_nothing_is_left_beside_it(data_path):
    identity = Identity(data_path)
    identity.reserve_oids(1)
    assert os.listdir(Path(data_path).parent) == ["Data.fs.zeolith"]


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_full_disk_reserves_nothing_and_loses_nothing(data_path, monkeypatch, step):
    identity = Identity(data_path)
    identity.reserve_oids(1000)

    def fail(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os if step == "fsync" else Path, step, fail)
        with pytest.raises(OSError, match="No space left"):
            identity.reserve_oids(2000)
    assert identity.oids_reserved == 1000
    assert Identity(data_path).oids_reserved == 1000
    identity.reserve_oids(2000)
    assert Identity(data_path).oids_reserved == 2000


def test_what_a_crash_left_behind_is_no_obstacle(data_path):
    identity = Identity(data_path)
    beside(data_path).with_suffix(".zeolith.new").write_text("half of")
    identity.reserve_oids(7)
    assert Identity(data_path).oids_reserved == 7
