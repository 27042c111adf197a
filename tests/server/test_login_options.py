import click
import pytest
from click.testing import CliRunner

from zeolith.protocol.credentials import credentials_of
from zeolith.server.login_options import login_options, taken_credentials

SECRET = "correct horse battery"


@click.command()
@login_options
def show(**options):
    found = taken_credentials(options)
    assert not options
    click.echo(repr(found))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("ZEOLITH_PASSWORD", raising=False)
    monkeypatch.delenv("ZEOLITH_TOKEN", raising=False)


def run(*arguments, fails=0, **env):
    result = CliRunner().invoke(show, arguments, env=env)
    assert result.exit_code == fails, result.output
    return result.output


def test_without_options_one_is_nobody():
    assert run().strip().startswith("<zeolith.protocol.login.Nobody")


def test_one_is_a_user_or_has_a_token(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    path = str(tmp_path / "secret")
    assert run("--username", "ann", "--password-file", path) == "<Password of ann>\n"
    assert run("--token-file", path) == "<Token>\n"
    assert run("--username", "ann", ZEOLITH_PASSWORD=SECRET) == "<Password of ann>\n"
    assert run(ZEOLITH_TOKEN=SECRET) == "<Token>\n"
    assert credentials_of(token_file=path) is not None


@pytest.mark.parametrize("what", ["password", "token"])
def test_a_secret_on_the_command_line_is_refused_with_an_explanation(what):
    output = run("--username", "ann", f"--{what}", SECRET, fails=2)
    assert f"a {what} on a command line can be read by everybody" in output
    assert f"ZEOLITH_{what.upper()}" in output
    assert SECRET not in output
    assert f"--{what} " not in run("--help")


def test_what_makes_no_sense_is_a_wrong_command_line():
    assert "there is no password for ann" in run("--username", "ann", fails=2)
