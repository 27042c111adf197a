import os
import sys

import pytest

from zeolith.protocol import credentials
from zeolith.protocol.credentials import Asked, Given, InFile, credentials_of
from zeolith.protocol.login import (
    NO_CREDENTIALS,
    LoginError,
    Password,
    Secret,
    Token,
)

SECRET = "correct horse battery"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("ZEOLITH_PASSWORD", raising=False)
    monkeypatch.delenv("ZEOLITH_TOKEN", raising=False)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\nand more\n")
    return str(path)


def secret_of(found: object) -> str:
    (secret,) = (each for each in vars(found).values() if isinstance(each, Secret))
    return secret.read()


def test_without_anything_one_is_nobody():
    assert credentials_of() is NO_CREDENTIALS


def test_a_password_is_an_option_or_in_a_file_or_in_the_environment(path, monkeypatch):
    assert secret_of(credentials_of(username="ann", password="given")) == "given"
    assert secret_of(credentials_of(username="ann", password_file=path)) == SECRET
    monkeypatch.setenv("ZEOLITH_PASSWORD", "from outside")
    assert secret_of(credentials_of(username="ann")) == "from outside"
    assert secret_of(credentials_of(username="ann", password_file=path)) == SECRET


def test_a_token_is_in_a_file_or_in_the_environment(path, monkeypatch):
    found = credentials_of(token_file=path)
    assert isinstance(found, Token)
    assert secret_of(found) == SECRET
    monkeypatch.setenv("ZEOLITH_TOKEN", "from outside")
    assert secret_of(credentials_of()) == "from outside"
    assert isinstance(credentials_of(username="ann", password="x"), Password)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"password": "x"}, "without username"),
        ({"password_file": "x"}, "without username"),
        ({"username": "ann"}, "there is no password for ann"),
        ({"username": "ann", "password": "x", "password_file": "y"}, "not both"),
        ({"username": "ann", "token_file": "x"}, "give no user"),
        ({"password": "x", "token_file": "x"}, "give no user"),
    ],
)
def test_what_makes_no_sense_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        credentials_of(**options)


def test_a_person_is_asked_once_and_only_where_there_is_a_terminal(monkeypatch):
    asked = []

    def getpass(question):
        asked.append(question)
        return "typed"

    monkeypatch.setattr(credentials, "getpass", getpass)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    found = credentials_of(username="ann", may_ask=True)
    assert not asked
    assert [secret_of(found), secret_of(found)] == ["typed", "typed"]
    assert asked == ["Password of ann: "]
    with pytest.raises(ValueError, match="no password"):
        credentials_of(username="ann")


def test_who_does_not_answer_does_not_log_in(monkeypatch):
    def getpass(_question):
        raise EOFError

    monkeypatch.setattr(credentials, "getpass", getpass)
    with pytest.raises(LoginError, match="no password was given"):
        Asked("?").read()


def test_a_file_is_read_each_time(path):
    secret = InFile(path)
    assert secret.read() == SECRET
    with open(path, "w") as file:
        file.write("another")
    assert secret.read() == "another"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "No such file"),
        (b"", "first line is empty"),
        (b"\nsecret", "first line is empty"),
        (b"\xff\xfe", "holds no text"),
        (b"x" * 2000, "longer than any"),
    ],
)
def test_a_file_that_is_of_no_use_is_told(tmp_path, content, text):
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoginError, match=text) as raised:
        InFile(str(path)).read()
    assert str(path) in str(raised.value)
    assert raised.value.reason == "login"


def test_what_is_no_file_is_not_read(tmp_path):
    with pytest.raises(LoginError, match="no regular file"):
        InFile(os.devnull).read()


def test_nothing_shows_the_secret(path):
    for found in (
        Given(SECRET),
        InFile(path),
        credentials_of(username="ann", password=SECRET),
        credentials_of(token_file=path),
    ):
        assert SECRET not in repr(found)
        assert SECRET not in str(found)
        assert SECRET not in f"{found!r:.500}"
