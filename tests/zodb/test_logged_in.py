"""ZODB's storage tests by a user who has logged in, at a server where nobody else may.

The user administers: some of the tests choose the tids of their transactions.
"""

from pathlib import Path

import pytest
from ZODB.tests.TransactionalUndoStorage import TransactionalUndoStorage

from zeolith.server.access import parse_grants
from zeolith.server.key_files import add_user

from .served import EveryStorage


@pytest.mark.slow
class LoggedInTests(EveryStorage, TransactionalUndoStorage):
    storage = "<filestorage {name}>\n  path {name}.fs\n</filestorage>\n"
    options = "<access>\nusers users\n</access>"
    client_options = {"username": "ann", "password": "correct horse"}  # noqa: RUF012

    @classmethod
    def prepare(cls, folder: Path) -> None:
        add_user(folder / "users", "ann", "correct horse", parse_grants("admin"))


del EveryStorage, TransactionalUndoStorage
