"""Telling systemd how the service is (sd_notify(3)), when systemd started it.

A datagram to the socket that ``NOTIFY_SOCKET`` names; without it nothing happens.
"""

import logging
import os
import socket

logger = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send ``state``, for example ``READY=1``; an absent listener is no error."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    # A leading @ is systemd's spelling of Linux's abstract namespace.
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            # The service is as well as before; only nobody hears of it.
            logger.warning("NOTIFY_SOCKET %s: %s", path, error)
