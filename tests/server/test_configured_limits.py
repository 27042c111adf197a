"""What the section <limits> says is what is in force."""

import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.server.config import SCHEMA, ConfigError, read_file

STORAGE = "<mappingstorage>\n</mappingstorage>\n"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    path = tmp_path / "server.conf"

    def read(lines: str) -> Limits:
        section = f"<limits>\n{lines}\n</limits>\n"
        path.write_text(f"<zeolith>\n{section}</zeolith>\n{STORAGE}")
        return read_file(str(path)).limits

    return read


def keys() -> dict[str, ElementTree.Element]:
    """The keys of the section by the name of the limit that they set."""
    root = ElementTree.parse(SCHEMA).getroot()
    (found,) = (
        each for each in root.iter("sectiontype") if each.get("name") == "limits"
    )
    return {str(key.get("attribute")): key for key in found.iter("key")}


def test_what_is_not_said_is_what_the_protocol_says(read, tmp_path):
    assert read("") == DEFAULT
    path = tmp_path / "plain.conf"
    path.write_text(STORAGE)
    assert read_file(str(path)).limits == DEFAULT


@pytest.mark.parametrize("limit", keys())
def test_every_key_sets_the_limit_of_its_name(read, limit):
    name = keys()[limit].get("name")
    assert name == limit.removesuffix("_s").replace("_", "-")
    value, wanted = {
        "_bytes_max": ("2MB", 2 * 1024**2),
        "_max": ("7", 7),
        "_s": ("7s", 7.0),
    }[next(end for end in ("_bytes_max", "_max", "_s") if limit.endswith(end))]
    lines = f"{name} {value}"
    if limit == "hello_frame_bytes_max":
        lines += "\nhello-bytes-max 2MB"
    limits = read(lines)
    assert getattr(limits, limit) == wanted
    others = {each.name for each in fields(Limits)} - {limit, "hello_bytes_max"}
    for other in others:
        assert getattr(limits, other) == getattr(DEFAULT, other)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("connections-max 0", "would let nothing through"),
        ("output-bytes-max 0", "would let nothing through"),
        ("requests-open-max many", "invalid literal"),
        ("hello-timeout 0", "no time to wait"),
        ("frame-bytes-max 1MB", "clients need 2097152"),
        ("frame-bytes-max 1GB", "take 268435456 at most"),
        ("hello-bytes-max 1KB", "hello-frame-bytes-max is more than"),
        ("hello-bytes-max 1GB", "hello-bytes-max is more than frame"),
        ("heartbeat-timeout 3s", "heartbeat-timeout"),
    ],
)
def test_a_limit_that_cannot_be_is_a_mistake_of_one_line(read, lines, complaint):
    with pytest.raises(ConfigError, match=complaint) as raised:
        read(lines)
    assert "server.conf" in str(raised.value)
    assert "\n" not in str(raised.value)
