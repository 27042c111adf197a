"""What ``zeolith status`` tells: one plain mapping, made on the loop.

The mapping holds only what msgpack and JSON both have, so tids are hexadecimal text.
"""

import os
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from zeolith.protocol.roles import AccessRole
from zeolith.server.access import Identity
from zeolith.server.committer import Commit
from zeolith.server.served import Served

if TYPE_CHECKING:
    from zeolith.server.service import Service


async def status_of(service: "Service", asker: Identity) -> dict[str, Any]:
    """The state of the server now; waits for the storages' sizes.

    Of the storages, those that ``asker`` administers.
    """
    return {
        "version": version("zeolith"),
        "pid": os.getpid(),
        "uptime_s": round(time.time() - service.started_at, 3),
        "transaction_timeout_s": service.transaction_timeout_s,
        "connections": len(service.peers),
        "storages": {
            name: await _storage_status(service, served)
            for name, served in service.databases.items()
            if AccessRole.ADMIN in asker.roles_on(name)
        },
    }


async def _storage_status(service: "Service", served: Served) -> dict[str, Any]:
    size, objects = await served.workers.read(served.database.info)
    committer = served.committer
    return {
        "size_bytes": size,
        "objects": objects,
        "last_tid": served.changes.last_tid.hex(),
        "database_id": served.database.database_id.hex(),
        "epoch": served.database.epoch,
        "read_only": served.is_read_only,
        "broken": str(committer.broken) if committer.broken else None,
        "counters": asdict(served.counters),
        "pack": served.packing.describe() if served.packing else None,
        "transactions": [_commit_status(commit) for commit in committer.holders],
        "waiting": [_commit_status(commit) for commit in committer.waiting],
        "clients": [
            {
                "address": session.stream.address,
                "label": session.label,
                "identity": str(session.identity),
                "roles": sorted(session.roles),
                "read_only": session.is_read_only,
                "channels": len(session.channels),
            }
            for session in service.sessions.values()
            if session.served is served
        ],
    }


def _commit_status(commit: Commit) -> dict[str, Any]:
    return {
        "client": commit.label,
        "phase": commit.phase.value,
        "operations": len(commit.transaction.operations),
    }
