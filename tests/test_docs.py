"""What the documentation says is there, and what is there is in the documentation."""

import doctest
import inspect
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import ZConfig
from zodburi import resolve_uri

from zeolith.client import errors, uri
from zeolith.client.storage import ClientStorage
from zeolith.protocol.compiled import SWITCH
from zeolith.protocol.errors import Overloaded, ShuttingDown, TransactionTimeout
from zeolith.server import config
from zeolith.server.cli import main
from zeolith.server.served import Counters

from .support.serving import ServerProcess

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.glob("*.md"),
        *(ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"),
        *(ROOT / "protocol" / "README.md", ROOT / "deploy" / "README.md"),
    ]
)
TRANSIENT = (TransactionTimeout, ShuttingDown, Overloaded)
KEYS = ROOT / "client" / "keys.xml"
REFERENCE = (DOCS / "reference.md").read_text()
# Databases of ZODB, and what Zope's own schema says of <zodb_db>.
SCHEMA = """
<schema>
  <import package="ZODB"/>
  <sectiontype name="zodb_db" datatype="ZODB.config.ZODBDatabase"
               implements="ZODB.database" extends="zodb">
    <multikey name="mount-point" required="yes" attribute="mount_points"/>
  </sectiontype>
  <multisection type="ZODB.database" name="*" attribute="databases"/>
</schema>
"""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
URI = re.compile(r"zeolith://\S+")


class Block(NamedTuple):
    """What stands between two fences."""

    page: Path
    # Of the opening fence.
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        line = 1 + text.count("\n", 0, found.start())
        yield Block(page, line, found[1], found[2])


BLOCKS = [block for page in PAGES for block in blocks(page)]


def name_of(value: Path | Block) -> str:
    """How pytest calls a page or a block."""
    if isinstance(value, Block):
        return f"{name_of(value.page)}:{value.line}"
    return str(value.relative_to(ROOT))


def section(heading: str) -> str:
    """The part of the reference below ``heading``, up to the next heading."""
    (found,) = re.findall(rf"^{heading}\n(.*?)(?=^#|\Z)", REFERENCE, re.M | re.S)
    return str(found)


def rows(heading: str) -> list[list[str]]:
    """The rows of the tables below ``heading``, without the backticks."""
    return [
        [cell.strip().replace("`", "") for cell in line.strip("| ").split("|")]
        for line in section(heading).splitlines()
        if line.startswith("|")
    ]


def keys(schema: Path, sectiontype: str) -> dict[str, str | None]:
    """The keys of a section and their defaults."""
    root = ElementTree.parse(schema).getroot()
    (found,) = (
        each for each in root.iter("sectiontype") if each.get("name") == sectiontype
    )
    return {
        str(key.get("name")): key.get("default")
        for key in found
        if key.tag in ("key", "multikey")
    }


def commands(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """All of a group, by the words that call them, groups in it and their own."""
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None
        yield f"{name}{word}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name}{word} ")


@pytest.mark.parametrize(("name", "command"), list(commands(main)))
def test_every_command_and_option_is_in_the_reference(name, command):
    text = section(f"### zeolith {name}")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            if parameter.hidden:
                # It is there to be refused with an explanation.
                continue
            assert {*parameter.opts, *parameter.secondary_opts} <= set(
                re.findall(r"(?<![\w-])--?[\w-]+", text)
            )
        else:
            assert str(parameter.name).upper() in text


def test_the_options_of_the_program_are_in_the_reference():
    text = section("## The command")
    context = click.Context(main, **main.context_settings)
    options = {
        opt
        for parameter in main.get_params(context)
        for opt in parameter.opts
        if isinstance(parameter, click.Option)
    }
    assert {"--help", "-h"} <= options
    assert all(f"`zeolith {option}`" in text for option in options)


@pytest.mark.parametrize(
    "heading", ["## What a ClientStorage can do", "### zeolith serve"]
)
def test_the_switch_for_what_is_compiled_is_in_the_reference(heading):
    assert f"`{SWITCH}=0`" in section(heading)


def test_every_key_of_the_server_is_in_the_reference_with_its_default():
    described = {row[0]: row for row in rows("## The server's configuration file")}
    for key, default in keys(config.SCHEMA, "zeolith").items():
        assert key in described
        assert default in (None, described[key][2]), key


def test_every_key_of_the_access_is_in_the_reference_with_its_default():
    described = {row[0]: row for row in rows("### Access")}
    for key, default in keys(config.SCHEMA, "access").items():
        assert key in described
        assert default in (None, described[key][2]), key


def test_every_limit_that_can_be_configured_is_in_the_reference_with_its_default():
    described = {row[0]: row for row in rows("### What clients can run into")}
    limits = keys(config.SCHEMA, "limits")
    assert len(limits) > 10
    for key, default in limits.items():
        assert described[key][2] == default, key


def test_every_key_of_tls_is_in_the_reference_with_its_default():
    described = {row[0]: row for row in rows("## The server's configuration file")}
    for key, default in keys(config.SCHEMA, "tls").items():
        assert key in described
        assert default in (None, described[key][2]), key


def test_every_key_of_a_client_is_in_the_reference_with_its_default():
    described = {row[1].split(",")[0].split(";")[0]: row for row in rows("### Options")}
    for key, default in keys(KEYS, "zeolith.client.keys").items():
        assert key in described
        assert default in (None, described[key][3]), key


def test_every_argument_of_a_client_is_in_the_reference():
    described = {row[0].split(";")[0] for row in rows("### Options")}
    arguments = set(inspect.signature(ClientStorage).parameters)
    assert arguments | {"argument and URI parameter", "---"} == described


def test_every_parameter_of_a_uri_is_an_argument_in_the_reference():
    described = {row[0].split(";")[0] for row in rows("### Options")}
    assert set(uri.PARAMETERS) | set(uri.NOT_IN_URI) <= described


def test_every_exception_is_in_the_reference():
    text = section("## Exceptions")
    classes = inspect.getmembers(errors, inspect.isclass)
    ours = [name for name, cls in classes if cls.__module__ == errors.__name__]
    assert {"ClientDisconnected", "CommitOutcomeUnknown"} <= set(ours)
    for name in (*ours, *(each.__name__ for each in TRANSIENT)):
        assert f"`{name}`" in text


def test_every_key_of_the_status_is_in_the_reference(tmp_path):
    with ServerProcess(tmp_path) as server:
        storage = ClientStorage(server.address)
        status = storage.server_status()
        storage.close()
    served = status["storages"]["1"]
    described = set(re.findall(r"`(\w+)`", section("### zeolith status")))
    assert {*status, *served, *served["clients"][0]} <= described
    assert {each.name for each in fields(Counters)} <= described
    assert json.loads(json.dumps(status)) == status


def test_the_index_leads_to_every_page():
    linked = set(LINK.findall((DOCS / "index.md").read_text()))
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= linked


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = heading.strip().lower().replace("`", "")
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        path, _hash, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_only_targets_of_the_makefile_are_made():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for page in PAGES:
        code = " ".join(block.text for block in blocks(page))
        code += " ".join(re.findall(r"`([^`\n]+)`", page.read_text()))
        assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= targets, page


def python_blocks() -> list[Block]:
    return [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", python_blocks(), ids=name_of)
def test_python_compiles(block):
    compile(block.text, block.page.name, "exec")


def test_what_is_typed_compiles():
    typed = [block for block in BLOCKS if block.language == "pycon"]
    assert typed
    for block in typed:
        for example in doctest.DocTestParser().get_examples(block.text):
            compile(example.source, block.page.name, "single")


def server_configurations() -> list[Block]:
    return [
        block
        for block in BLOCKS
        if "<zeolith>" in block.text
        and ("</filestorage>" in block.text or "</upstream>" in block.text)
    ]


@pytest.mark.parametrize("block", server_configurations(), ids=name_of)
def test_a_configuration_of_a_server_is_right(block, tmp_path):
    path = tmp_path / "server.conf"
    path.write_text(block.text.replace("/var/lib/zeolith", str(tmp_path)))
    assert config.read_file(str(path)).storages


def client_configurations() -> list[Block]:
    return [
        block for block in BLOCKS if block.text.startswith("%import zeolith.client\n")
    ]


@pytest.mark.parametrize("block", client_configurations(), ids=name_of)
def test_a_configuration_of_a_client_is_right(block):
    schema = ZConfig.loadSchemaFile(StringIO(SCHEMA))
    document, _handlers = ZConfig.loadConfigFile(schema, StringIO(block.text))
    (database,) = document.databases
    assert database.config.storage.config.server


def test_uris_are_right():
    found = [
        address
        for block in BLOCKS
        for address in URI.findall(block.text)
        if not block.language
    ]
    assert len(found) >= 4
    for address in found:
        resolve_uri(address)


def test_there_is_something_to_check():
    assert python_blocks()
    assert server_configurations()
    assert len(client_configurations()) >= 3
