"""A Data.fs of one's own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zeolith.storage.filestore import FileStore


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., FileStore]]:
    """Opens Data.fs of a folder; whatever is still open is closed at the end."""
    opened = []

    def open_store(folder: Path = tmp_path, **options: Any) -> FileStore:
        opened.append(FileStore("main", str(folder / "Data.fs"), **options))
        return opened[-1]

    yield open_store
    for each in opened:
        each.close()


@pytest.fixture
def database(open_store: Callable[..., FileStore]) -> FileStore:
    return open_store()
