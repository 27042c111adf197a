"""Every promise and every threat that is written down has a test that exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("SECURITY.md", "docs/reliability.md")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
# Tables whose rows need tests have such a column.
COLUMN = "Test"


def rows(page: str) -> list[str]:
    """The rows of the tables whose last column is of tests."""
    found: list[str] = []
    is_of_tests = False
    for line in (ROOT / page).read_text().splitlines():
        if not line.startswith("|"):
            is_of_tests = False
        elif line.rstrip("| ").rsplit("|", 1)[-1].strip() == COLUMN:
            is_of_tests = True
        elif is_of_tests and not line.startswith("| ---"):
            found.append(line)
    return found


@cache
def named_in(path: str) -> dict[str, bool]:
    """The tests in a file, and whether each is slow."""
    tree = ast.parse((ROOT / path).read_text())
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            marks = map(ast.unparse, node.decorator_list)
            found[node.name] = "pytest.mark.slow" in marks
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_exists(page):
    named = TEST.findall((ROOT / page).read_text())
    assert len(named) > 20
    for path, name in named:
        assert name.startswith("test_")
        assert name in named_in(path), f"{path}::{name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_row_names_a_test(page):
    assert len(rows(page)) > 10
    for row in rows(page):
        assert TEST.search(row.rsplit("|", 2)[-2]), row


@pytest.mark.parametrize("page", PAGES)
def test_every_row_has_a_test_that_is_always_run(page):
    """Or says that it is long."""
    for row in rows(page):
        slow = [named_in(path)[name] for path, name in TEST.findall(row)]
        assert not all(slow) or "(*long*)" in row, row
