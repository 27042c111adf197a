"""The example of the README works exactly as printed.

It is for two terminals. A block of Python belongs to the one that the comment before
it names: `<!-- terminal 1 -->` or `<!-- terminal 2 -->`; the blocks run from top to
bottom. What is typed stands after `>>>`, with what is printed below it.
"""

import doctest
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ..support.terminal import Terminal

README = Path(__file__).parents[2] / "README.md"
# Where `make serve` listens.
ADDRESS = "127.0.0.1:8100"
ARRIVAL_TIMEOUT_S = 5
BLOCK = re.compile(
    r"^<!-- terminal (?P<terminal>[12]) -->\n+```\w+\n(?P<source>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Some lines for one of the terminals."""

    terminal: str
    source: str


def blocks() -> list[Block]:
    found = BLOCK.finditer(README.read_text())
    return [Block(match["terminal"], match["source"]) for match in found]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server, started as the Makefile does, but on a port that is free."""
    command = [sys.executable, "-W", "error", "-m", "zeolith.server", "serve"]
    options = ["--address", "127.0.0.1:0", "--path", "Data.fs"]
    with subprocess.Popen(
        [*command, *options], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip().removeprefix("listening on ")
        finally:
            server.terminate()


def test_the_example_is_for_two_terminals():
    assert {block.terminal for block in blocks()} == {"1", "2"}
    assert ADDRESS in "".join(block.source for block in blocks())


def complaint(terminal: Terminal, source: str) -> str | None:
    """What is not as printed, when this is typed."""
    checker = doctest.OutputChecker()
    examples = doctest.DocTestParser().get_examples(source)
    assert examples, f"nothing is typed in: {source}"
    for example in examples:
        printed = terminal.run(example.source)
        if not checker.check_output(example.want, printed, 0):
            return f"typed: {example.source}expected: {example.want}got: {printed}"
    return None


def test_the_example_works_as_printed(address: str, tmp_path: Path):
    with Terminal(tmp_path) as one, Terminal(tmp_path) as other:
        terminals = {"1": one, "2": other}
        for block in blocks():
            terminal = terminals[block.terminal]
            source = block.source.replace(ADDRESS, address)
            # A change needs a moment from one process to the other. Whoever types
            # is slower; this test looks again.
            deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
            while (said := complaint(terminal, source)) is not None:
                assert time.monotonic() < deadline, f"terminal {block.terminal} {said}"
