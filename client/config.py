"""A ClientStorage from a ZConfig file.

``%import zeolith.client`` makes ZConfig read component.xml beside this module, which
adds the section ``<zeolith>`` to the storages of any ZODB configuration;
``%import zeolith.client.upstream`` adds the same as ``<upstream>``, for the file of a
server that serves another server's storage and where ``<zeolith>`` is taken. ZConfig
calls the datatypes here while it reads, and ``open()`` when the storage is wanted;
both in the thread that reads the configuration.

The keys of the section are the arguments of ClientStorage with ``-`` for ``_``, but
for ``_ARGUMENT_OF_KEY`` and what ``NOT_IN_CONFIG`` leaves out.
"""

from typing import Any

from ZODB.config import BaseConfig

from zeolith.client.storage import ClientStorage

# Arguments of ClientStorage that no key sets, and why.
NOT_IN_CONFIG = {
    "ssl": "an ssl.SSLContext is made by a program, not written in a file",
    "ssl_server_hostname": "is called tls-server-name",
    "credentials": "made by a program; username and the files are for this one",
    "limits": "the bounds of the wire are the same for everybody",
}
_ARGUMENT_OF_KEY = {"server": "addr", "cache_path": "cache"}


class ZeolithStorage(BaseConfig):
    """The section ``<zeolith>`` or ``<upstream>``."""

    def open(self) -> ClientStorage:
        """The ClientStorage that the section describes."""
        arguments: dict[str, Any] = {}
        for attribute in self.config.getSectionAttributes():
            value = getattr(self.config, attribute)
            # A key that is not there leaves the argument to ClientStorage's default.
            if value is not None:
                arguments[_ARGUMENT_OF_KEY.get(attribute, attribute)] = value
        return ClientStorage(**arguments)
