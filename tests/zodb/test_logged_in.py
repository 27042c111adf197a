"""ZODB's storage tests by a user who has logged in over TLS; nobody else may come in.

The user administers: some of the tests choose the tids of their transactions.
"""

from pathlib import Path

import pytest
from ZODB.tests.TransactionalUndoStorage import TransactionalUndoStorage

from zeolith.server.access import parse_grants
from zeolith.server.key_files import add_user

from ..support.certificates import Authority
from .served import EveryStorage

PASSWORD = "correct horse"


@pytest.mark.slow
class LoggedInTests(EveryStorage, TransactionalUndoStorage):
    storage = "<filestorage {name}>\n  path {name}.fs\n</filestorage>\n"

    @classmethod
    def prepare(cls, folder: Path) -> None:
        add_user(folder / "users", "ann", PASSWORD, parse_grants("admin"))
        authority = Authority(folder)
        certificate = authority.sign().both
        cls.options = f"""\
<access>
  users users
</access>
<tls>
  certificate {certificate}
</tls>
"""
        who = {"username": "ann", "password": PASSWORD}
        cls.client_options = {**who, "tls_ca": authority.ca}


del EveryStorage, TransactionalUndoStorage
