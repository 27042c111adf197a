"""Asking the server for a pack, and waiting for it or not.

A pack is asked for once: if the connection breaks meanwhile the server goes on with it,
so asking again would be refused, or be a second pack.
"""

import logging
import threading

from zeolith.client.channel import Channel
from zeolith.client.errors import ChannelLost, ClientDisconnected
from zeolith.client.session import Session

logger = logging.getLogger(__name__)


def pack(session: Session, time_s: float, gc: bool | None) -> None:
    """Pack, and return when it is done."""
    try:
        session.call("pack", time_s, gc)
    except ChannelLost as error:
        raise ClientDisconnected(f"while packing: {error}") from error


def begin_pack(session: Session, time_s: float, gc: bool | None) -> None:
    """Have the server begin a pack, and return at once; how it ends is logged."""
    try:
        channel = session.borrow()
        try:
            channel.ask("pack", time_s, gc)
        except BaseException:
            session.give_back(channel)
            raise
    except ChannelLost as error:
        raise ClientDisconnected(f"while asking for a pack: {error}") from error
    # It must not keep the process: the server has been asked.
    waiting = threading.Thread(
        target=_log_the_end, args=(session, channel), name="zeolith-pack", daemon=True
    )
    waiting.start()


def _log_the_end(session: Session, channel: Channel) -> None:
    try:
        channel.answer()
    except ChannelLost as error:
        logger.info("how a pack has ended is not known: %s", error)
    except Exception as error:  # noqa: BLE001 - every answer is logged
        logger.error("the pack was not done: %s", error)
    else:
        logger.info("the pack is done")
    finally:
        session.give_back(channel)
