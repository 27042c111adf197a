"""A FileStorage behind a server that speaks TLS is a FileStorage."""

import tempfile
from pathlib import Path

from ..support.certificates import Authority
from .served import EveryStorage


class EncryptedTests(EveryStorage):
    storage = """\
<filestorage {name}>
  path {name}.fs
</filestorage>
"""

    @classmethod
    def setUpClass(cls) -> None:
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        authority = Authority(Path(directory.name))
        cls.options = f"<tls>\ncertificate {authority.sign().both}\n</tls>"
        cls.client_options = {"tls_ca": authority.ca}
        super().setUpClass()


del EveryStorage
