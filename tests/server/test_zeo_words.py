"""What zeo.conf says is no riddle to who has to write a server.conf."""

import re
from pathlib import Path
from typing import Any

import pytest

from zeolith.server.config import ConfigError, read_file
from zeolith.server.zeo_words import advice

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
STORAGE = "<mappingstorage>\n</mappingstorage>\n"


def zeolith(text: str) -> str:
    return f"<zeolith>\n{text}\n</zeolith>\n{STORAGE}"


SSL = "<ssl>\ncertificate a.pem\nauthenticate DYNAMIC\n</ssl>"
TLS = "<tls>\ncertificate a.pem\n{}\n</tls>"


@pytest.fixture
def complaint(tmp_path: Path) -> Any:
    path = tmp_path / "server.conf"

    def complaint(text: str) -> str:
        path.write_text(text)
        with pytest.raises(ConfigError) as raised:
            read_file(str(path))
        return str(raised.value)

    return complaint


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        (f"<zeo>\naddress 8100\n</zeo>\n{STORAGE}", 1, "write <zeolith>"),
        (zeolith(SSL), 2, "in <zeolith> write <tls>: .* require-client-certificate on"),
        # Where ZEO's words are known, for the sake of a storage of its.
        (
            "%import ZEO\n" + zeolith(SSL.replace("DYNAMIC", "/")),
            3,
            "in <zeolith> write <tls>: ",
        ),
        (zeolith(TLS.format("authenticate a.pem")), 4, "write client-ca, and "),
        (
            zeolith(TLS.format("password-function a.b")),
            4,
            "write key-password-command or",
        ),
        (f"<runner>\nprogram x\n</runner>\n{STORAGE}", 1, "leave it out"),
        (f"<eventlog>\n</eventlog>\n{STORAGE}", 1, "leave it out"),
        (zeolith("invalidation-queue-size 100"), 2, "leave it out"),
        (zeolith("client-conflict-resolution on"), 2, "leave it out"),
    ],
)
def test_a_word_of_zeos_is_told_with_what_to_write(complaint, text, line, told):
    found = complaint(text)
    assert re.search(f"server.conf:{line}: .*; {told}", found), found
    assert "\n" not in found


@pytest.mark.parametrize("text", ["<zoe>\n</zoe>\n", zeolith("adress 8100")])
def test_of_other_words_nothing_is_told(complaint, text):
    assert ";" not in complaint(text)


def test_what_is_no_unknown_word_is_left_alone():
    assert advice("'runner' is not a valid number") is None


def test_a_file_of_ours_may_have_a_storage_of_zeos(tmp_path):
    path = tmp_path / "server.conf"
    path.write_text(
        "%import ZEO\n<clientstorage main>\nserver 127.0.0.1:8100\n</clientstorage>\n"
    )
    assert list(read_file(str(path)).storages) == ["main"]
