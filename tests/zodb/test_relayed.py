"""A FileStorage behind a server behind a server is a FileStorage."""

import tempfile
from pathlib import Path
from typing import ClassVar

from ..support.serving import ServerProcess
from .served import EveryStorage, stop_without_complaints


class FanOutTests(EveryStorage):
    """All tests talk to the relay; what they talk about is in the other server."""

    storage = """\
<filestorage {name}>
  path {name}.fs
</filestorage>
"""
    upstream: ClassVar[ServerProcess]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.upstream = cls.server
        host, port = cls.upstream.address
        names = list(cls.unused)
        cls.unused = iter(names)
        sections = "".join(
            f"<upstream {name}>\nserver {host}:{port}\nstorage {name}\n</upstream>\n"
            for name in names
        )
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.server = ServerProcess(
            Path(directory.name),
            storages=f"%import zeolith.client.upstream\n{sections}",
        )
        cls.server.start()
        cls.addClassCleanup(stop_without_complaints, cls.server)


del EveryStorage
