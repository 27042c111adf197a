import stat
import time
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner

from zeolith.server import access_cli, cli, key_files
from zeolith.server.key_files import read_tokens, read_users
from zeolith.server.keyring import AccessOptions, load
from zeolith.server.login import by_token

SECRET = "correct horse battery"


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    monkeypatch.setattr(key_files, "ITERATIONS", 4096)
    monkeypatch.delenv("ZEOLITH_PASSWORD", raising=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys"


def run(*arguments, fails=0, **env):
    result = CliRunner().invoke(cli.main, list(map(str, arguments)), env=env)
    assert result.exit_code == fails, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert SECRET not in result.output
    return result.output


def add(path, name, *options, **env):
    return run("user", "add", path, name, *options, ZEOLITH_PASSWORD=SECRET, **env)


def test_users_are_added_shown_and_removed(path):
    add(path, "bob", "--role", "read")
    add(path, "ann", "--role=write", "--role=pack", "--storage=a", "--storage=b")
    assert run("user", "list", path) == (
        "ann: write@a, write@b, pack@a, pack@b\nbob: read\n"
    )
    run("user", "roles", path, "bob", "--role", "none")
    run("user", "remove", path, "ann")
    assert run("user", "list", path) == "bob: none\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_password_comes_from_a_file(path, tmp_path):
    (tmp_path / "secret").write_text(SECRET + "\n")
    add(path, "ann", "--role", "read")
    before = read_users(path)[0]["ann"]
    run("user", "passwd", path, "ann", "--password-file", tmp_path / "secret")
    assert read_users(path)[0]["ann"] != before


def test_a_password_is_asked_for_twice(path, monkeypatch):
    answers = [SECRET, SECRET, SECRET, "mistyped"]
    questions = []

    def getpass(question):
        questions.append(question)
        return answers.pop(0)

    monkeypatch.setattr(access_cli, "getpass", getpass)
    monkeypatch.setattr(access_cli, "_is_terminal", lambda: True)
    run("user", "add", path, "ann", "--role", "read")
    assert questions == ["New password of ann: ", "Once more: "]
    output = run("user", "add", path, "bob", "--role", "read", fails=1)
    assert "not the same" in output


def test_nobody_can_be_asked_without_a_terminal(path):
    output = run("user", "add", path, "ann", "--role", "read", fails=1)
    assert output.startswith("zeolith: there is no terminal to ask")
    assert not path.exists()


def test_a_mistake_is_one_line(path):
    for arguments in (
        ("user", "list", path),
        ("user", "remove", path, "ann"),
        ("token", "list", path),
        ("token", "revoke", path, "x"),
        ("user", "passwd", path, "ann", "--password-file", path),
    ):
        output = run(*arguments, fails=1)
        assert output.startswith(f"zeolith: {path}")
        assert output.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--role", "root"),
        ("--role", "none", "--role", "read"),
        ("--role", "none", "--storage", "a"),
    ],
)
def test_roles_that_make_no_sense_are_refused(path, options):
    run("user", "add", path, "ann", *options, fails=2, ZEOLITH_PASSWORD=SECRET)


def test_a_token_is_printed_once(path):
    token = run("token", "create", path, "--role=read", "--expires=never").strip()
    known = by_token(load(AccessOptions(tokens=path)), token, time.time())
    assert known.expires_s is None
    shown = run("token", "list", path)
    assert shown == f"{known.name}: read, never ends\n"
    assert token not in shown
    run("token", "revoke", path, known.name)
    assert run("token", "list", path) == ""


def test_a_token_ends_when_it_was_said(path):
    create = ("token", "create", path, "--role=write", "--storage=main")
    run(*create, "--expires=2001-01-31", "--label=cron")
    assert "write@main, has ended 2001-01-31 00:00 UTC, cron" in run(
        "token", "list", path
    )
    run(*create, "--expires=90d")
    run(*create, "--expires=2999-01-31T12:00+01:00")
    ends = sorted(each.expires_s or 0 for each in read_tokens(path).values())
    assert ends[1] == pytest.approx(time.time() + 90 * 86400, abs=100)
    assert ends[2] == datetime(2999, 1, 31, 11, tzinfo=UTC).timestamp()
    run(*create, "--expires=some day", fails=2)
    run(*create, fails=2)


def test_a_whole_token_can_be_revoked(path):
    token = run("token", "create", path, "--role=read", "--expires=1d").strip()
    run("token", "revoke", path, token)
    assert not read_tokens(path)
