"""What commands are told of TLS."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from zeolith.protocol.tls import ClientTls
from zeolith.server.cli import main
from zeolith.server.tls_options import tls_options

from ..support.certificates import Authority, context_of
from ..support.inprocess import serving


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def meaning(*arguments: str) -> tuple[ClientTls | None, Any]:
    """What a command is given as ``tls``, and how it ended."""
    given = []

    @click.command()
    @tls_options
    def command(tls: ClientTls | None) -> None:
        given.append(tls)

    result = CliRunner().invoke(command, arguments)
    return (given or [None])[0], result


def test_without_a_word_about_it_nothing_is_encrypted():
    tls, result = meaning()
    assert tls is None
    assert result.exit_code == 0


def test_each_word_about_it_is_enough(authority):
    for words in (
        ["--tls"],
        ["--tls-ca", authority.ca],
        ["--tls-certificate", authority.sign().both],
        ["--tls-server-name", "db"],
        ["--no-tls-verify"],
    ):
        tls, result = meaning(*words)
        assert tls is not None, words
        assert result.exit_code == 0


def test_a_file_that_cannot_be_used_is_a_wrong_command_line(authority):
    _tls, result = meaning("--tls-ca", authority.sign().key)
    assert result.exit_code == 2
    assert "server.key: there is no certificate in it" in result.output


def test_every_command_that_asks_a_server_has_them(authority, tmp_path):
    context = context_of(authority.sign())
    with serving(tmp_path / "Data.fs", tls=context) as server:
        address = f"{server.address[0]}:{server.address[1]}"
        for command in (["ping"], ["status", "--json"], ["pack", "--days", "0"]):
            run = CliRunner().invoke
            trusting = run(main, [*command, "--tls-ca", authority.ca, address])
            assert trusting.exit_code == 0, trusting.output
            plain = run(main, [*command, address])
            assert plain.exit_code == 1
            assert "this server speaks TLS" in plain.output
            careful = run(main, [*command, "--tls", address])
            assert careful.exit_code == 1
            assert "certificate is not trusted" in careful.output


def test_a_server_without_tls_and_one_that_wants_a_certificate_say_so(
    authority, tmp_path
):
    run = CliRunner().invoke
    for context, words in (
        (None, "the server speaks no TLS"),
        (context_of(authority.sign(), wants=authority), "wants a certificate of its"),
    ):
        with serving(tmp_path / "Data.fs", tls=context) as server:
            address = f"{server.address[0]}:{server.address[1]}"
            for command in ("ping", "pack"):
                told = run(main, [command, "--tls-ca", authority.ca, address])
                assert told.exit_code == 1
                assert words in told.output
                assert len(told.output.splitlines()) == 1
