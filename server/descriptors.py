"""How many descriptors the process may have, and what they are for.

Every socket takes one, and so do files: databases, blobs, what transactions spill. If
sockets could take them all, a commit would fail for want of a file, so a part is kept
from them; as long as there is a part, the loop accepts whoever comes, and can tell
whoever is one too many. Called once at the start, and by the clock.

If something else takes all descriptors after all, libuv closes what it cannot accept
(a descriptor in reserve lets it), so the loop neither spins nor stops: see
``uv__emfile_trick`` in its src/unix/stream.c.
"""

import errno
import logging
import os
import resource

logger = logging.getLogger(__name__)

# For what is open anyway: the databases, the loop, the listening sockets.
KEPT = 64
# Of the rest, one in so many is not for sockets.
FILES_SHARE = 4


def connections_possible(wanted: int) -> int:
    """How many sockets there may be, at most ``wanted``.

    The soft limit of the process is raised for it as far as the hard one goes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = KEPT + -(-wanted * FILES_SHARE // (FILES_SHARE - 1))
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        except (OSError, ValueError) as error:
            logger.info("the limit of open files stays at %d: %s", soft, error)
        else:
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    possible = max(1, (soft - KEPT) * (FILES_SHARE - 1) // FILES_SHARE)
    logger.warning(
        "only %d connections are possible, not %d (connections_max): the system allows"
        " this process %d open files; for all of them it takes %d",
        possible,
        wanted,
        soft,
        needed,
    )
    return possible


class Watch:
    """Says once that there are no descriptors left, and once that there are again."""

    def __init__(self) -> None:
        self.is_out = False

    def tick(self) -> None:
        """Look whether there is one."""
        try:
            os.close(os.dup(2))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or self.is_out:
                return
            self.is_out = True
            logger.error(
                "there are no file descriptors left (%s): nobody new can connect, and"
                " commits may fail; those who are connected go on",
                error.strerror,
            )
        else:
            if self.is_out:
                logger.warning("there are file descriptors again")
            self.is_out = False
