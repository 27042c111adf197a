import json
import os
import stat
import threading
from pathlib import Path

import pytest

from zeolith.server import key_files
from zeolith.server.access import Access, parse_grants
from zeolith.server.key_files import (
    KeyFileError,
    add_user,
    create_token,
    label_of_tokens,
    read_tokens,
    read_users,
    remove_user,
    revoke_token,
    set_password,
    set_roles,
)
from zeolith.server.login import by_token

SECRET = "correct horse battery"
WRITE = parse_grants("write@main read")
READ = parse_grants("read")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys"


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    monkeypatch.setattr(key_files, "ITERATIONS", 4096)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_users_are_added_changed_and_removed(path):
    add_user(path, "ann", SECRET, WRITE)
    add_user(path, "bob", SECRET, ())
    users, secret = read_users(path)
    assert sorted(users) == ["ann", "bob"]
    assert users["ann"].identity.grants == WRITE
    assert users["bob"].identity.grants == ()
    assert users["ann"].salt != users["bob"].salt
    assert len(secret) == 32
    set_roles(path, "bob", READ)
    remove_user(path, "ann")
    users, same = read_users(path)
    assert [(name, user.identity.grants) for name, user in users.items()] == [
        ("bob", READ)
    ]
    assert same == secret


def test_another_password_is_another_identity(path):
    add_user(path, "ann", SECRET, WRITE)
    before = read_users(path)[0]["ann"].identity
    set_roles(path, "ann", READ)
    assert read_users(path)[0]["ann"].identity.key == before.key
    set_password(path, "ann", SECRET)
    after = read_users(path)[0]["ann"].identity
    assert after.key != before.key
    assert after.grants == READ


def test_a_token_is_shown_once_and_its_hash_is_kept(path):
    token = create_token(path, "for the cron job", WRITE, 200.0, now_s=100.0)
    assert token not in path.read_text()
    assert token.partition(".")[2] not in path.read_text()
    tokens = read_tokens(path)
    identity = by_token(Access(tokens=tokens), token, 150.0)
    assert identity.grants == WRITE
    assert identity.expires_s == 200.0
    assert label_of_tokens(path) == {identity.name: "for the cron job"}
    other = create_token(path, "", READ, None, now_s=100.0)
    assert other != token
    revoke_token(path, identity.name)
    assert list(read_tokens(path)) == [other.partition(".")[0]]


def test_the_file_has_neither_password_nor_token(path):
    add_user(path, "ann", SECRET, WRITE)
    assert SECRET not in path.read_text()
    assert SECRET not in repr(read_users(path))


def test_the_files_are_their_owners_alone(path):
    was = os.umask(0)
    try:
        add_user(path, "ann", SECRET, WRITE)
        set_roles(path, "ann", READ)
    finally:
        os.umask(was)
    assert mode_of(path) == 0o600
    assert mode_of(path.with_name("keys.lock")) == 0o600
    assert sorted(os.listdir(path.parent)) == ["keys", "keys.lock"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda path: add_user(path, "ann", "x", READ), "a user ann already"),
        (lambda path: set_password(path, "bob", "x"), "there is no bob"),
        (lambda path: set_roles(path, "bob", READ), "there is no bob"),
        (lambda path: remove_user(path, "bob"), "there is no bob"),
        (lambda path: add_user(path, "bob", "", READ), "password is empty"),
        (lambda path: add_user(path, "bob", "\x07", READ), "cannot be used"),
        (lambda path: add_user(path, "", "x", READ), "no name for a user"),
        (lambda path: add_user(path, "a b", "x", READ), "no name for a user"),
        (lambda path: add_user(path, "änn", "x", READ), "no name for a user"),
        (lambda path: add_user(path, "a" * 65, "x", READ), "no name for a user"),
        (lambda path: revoke_token(path, "x"), "it is no file of"),
        (lambda path: create_token(path, "", READ, None, 0.0), "it is no file of"),
    ],
    ids=range(12),
)
def test_what_cannot_be_done_changes_nothing(path, call, text):
    add_user(path, "ann", SECRET, WRITE)
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match=text):
        call(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == ["keys", "keys.lock"]


def test_a_file_that_is_not_there_is_made_for_an_addition_only(path):
    for call in (
        lambda: remove_user(path, "ann"),
        lambda: revoke_token(path, "x"),
        lambda: read_users(path),
        lambda: read_tokens(path),
    ):
        with pytest.raises(KeyFileError, match="No such file"):
            call()
    assert not path.exists()


ENTRY = {
    "roles": "read",
    "salt": "AAAA",
    "stored_key": "AAAA",
    "server_key": "AAAA",
    "iterations": 4096,
}


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format": "zeolith users, 2", "users": {}, "secret": ""}',
        b'{"format": "zeolith users, 1"}',
        b'{"format": "zeolith users, 1", "users": []}',
        b'{"format": "zeolith users, 1", "users": {}, "secret": "x"}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_refused_in_a_line(path, document):
    path.write_bytes(document)
    with pytest.raises(KeyFileError) as raised:
        read_users(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"roles": "root"},
        {"roles": 7},
        {"roles": None},
        {"salt": "?"},
        {"salt": None},
        {"stored_key": 1},
        {"iterations": "many"},
        {"iterations": True},
    ],
)
def test_a_damaged_user_is_refused(path, change):
    document = {
        "format": "zeolith users, 1",
        "secret": "00",
        "users": {"ann": {**ENTRY, **change}},
    }
    path.write_text(json.dumps(document))
    with pytest.raises(KeyFileError, match="damaged"):
        read_users(path)


@pytest.mark.parametrize(
    "change", [{"sha256": "x"}, {"sha256": None}, {"expires": "2027"}, {"roles": ""}]
)
def test_a_damaged_token_is_refused(path, change):
    entry = {"roles": "read", "sha256": "00", "expires": None, "label": "", **change}
    document = {"format": "zeolith tokens, 1", "tokens": {"0a": entry}}
    path.write_text(json.dumps(document))
    with pytest.raises(KeyFileError, match="damaged"):
        read_tokens(path)


def test_two_at_once_lose_nothing(path):
    add_user(path, "first", SECRET, READ)
    names = [f"user{number}" for number in range(12)]

    def add(name):
        add_user(path, name, SECRET, READ)

    threads = [threading.Thread(target=add, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_users(path)[0]) == {"first", *names}


def test_a_disk_that_is_full_leaves_the_old_file(path, monkeypatch):
    add_user(path, "ann", SECRET, READ)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        add_user(path, "bob", SECRET, READ)
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == ["keys", "keys.lock"]
