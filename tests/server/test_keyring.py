import asyncio
import logging
import os

import pytest

from zeolith.server import key_files
from zeolith.server.access import OPEN, Access, Identity, parse_grants
from zeolith.server.key_files import KeyFileError, add_user, create_token, remove_user
from zeolith.server.keyring import AccessOptions, Keyring, KeyWatch, load

from ..support.waiting import wait_on_loop

READ = parse_grants("read")
APP = Identity("certificate", "CN=app", READ)


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    monkeypatch.setattr(key_files, "ITERATIONS", 4096)


@pytest.fixture
def options(tmp_path):
    add_user(tmp_path / "users", "ann", "secret", READ)
    create_token(tmp_path / "tokens", "", READ, None, 0.0)
    return AccessOptions(
        anonymous=parse_grants("none"),
        users=tmp_path / "users",
        tokens=tmp_path / "tokens",
        certificates=(APP,),
    )


def test_without_a_section_everybody_may_do_everything():
    assert load(None) is OPEN
    assert Keyring(None).renew() is None


def test_all_that_is_said_is_known(options):
    access = load(options)
    assert list(access.users) == ["ann"]
    assert len(access.tokens) == 1
    assert len(access.secret) == 32
    assert access.by_subject("CN=app") is APP
    for unknown in (None, "CN=other"):
        assert access.by_subject(unknown).kind == "anonymous"
    assert options.has_login
    assert not AccessOptions(anonymous=READ).has_login


def test_a_file_that_is_missing_is_told_at_the_start(options):
    options.users.unlink()
    with pytest.raises(KeyFileError, match="No such file"):
        Keyring(options)


def test_what_has_changed_is_read_again_once(options):
    keyring = Keyring(options)
    assert keyring.renew() is None
    add_user(options.users, "bob", "secret", READ)
    access = keyring.renew()
    assert access is not None
    assert sorted(access.users) == ["ann", "bob"]
    assert keyring.renew() is None


def test_a_broken_file_is_complained_of_once_and_the_old_stays(options, caplog):
    keyring = Keyring(options)
    good = options.users.read_bytes()
    options.users.write_bytes(b"{")
    assert keyring.renew() is None
    assert keyring.renew() is None
    assert caplog.text.count("what was known of users and tokens stays") == 1
    assert list(keyring.access.users) == ["ann"]
    options.users.unlink()
    assert keyring.renew() is None
    options.users.write_bytes(good)
    assert keyring.renew() is not None


def test_a_file_that_others_can_read_is_complained_of(options, caplog):
    os.chmod(options.tokens, 0o640)
    Keyring(options)
    assert f"chmod 600 {options.tokens}" in caplog.text
    assert str(options.users) not in caplog.text


def test_who_may_not_come_any_more_is_not_renewed(options):
    access = load(options)
    ann = access.users["ann"].identity
    (token,) = access.tokens.values()
    for known in (ann, token, APP):
        assert access.renewed(known) == known
    remove_user(options.users, "ann")
    add_user(options.users, "ann", "secret", READ)
    again = load(options)
    assert again.renewed(ann) is None
    assert OPEN.renewed(token) is OPEN.renewed(APP) is None


async def test_the_loop_hears_of_what_has_changed(options):
    heard: list[Access] = []
    watch = KeyWatch(Keyring(options), heard.append)
    watch.tick()
    add_user(options.users, "bob", "secret", READ)

    def is_heard():
        watch.tick()
        return heard

    await wait_on_loop(is_heard, "the new user")
    assert "bob" in heard[0].users


@pytest.mark.parametrize("has_section", [False, True])
async def test_no_thread_is_woken_where_there_is_no_file(monkeypatch, has_section):
    keyring = Keyring(AccessOptions(certificates=(APP,)) if has_section else None)
    looks: list[None] = []
    monkeypatch.setattr(keyring, "renew", lambda: looks.append(None))
    heard: list[Access] = []
    KeyWatch(keyring, heard.append).tick()
    # It waits for whatever is in a thread.
    await asyncio.get_running_loop().shutdown_default_executor()
    assert not looks


async def test_the_loop_goes_by_other_options(options, caplog):
    heard: list[Access] = []
    watch = KeyWatch(Keyring(options), heard.append)
    watch.configure(None)
    await wait_on_loop(lambda: heard, "the new options")
    assert heard == [OPEN]
    options.users.unlink()
    with caplog.at_level(logging.ERROR):
        watch.configure(options)
        await wait_on_loop(lambda: "stays" in caplog.text, "the complaint")
    assert heard == [OPEN]
    watch.tick()
    await asyncio.sleep(0)
