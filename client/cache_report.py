"""What is told of a cache file, found out by a process of its own.

LMDB trusts what it reads: a damaged page may end the process that comes upon it by a
signal. So ``examine`` has another process look (``main``), and a signal is what it has
found. The values are plain: they go from one to the other as JSON, and to whoever asks
for that.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lmdb
from persistent.TimeStamp import TimeStamp

from zeolith.client.cache_inspection import DamagedFile, Inspection
from zeolith.client.cache_place import identity_of
from zeolith.client.record_class import class_of

# Who has seen so many needs no more to know.
FINDINGS_MAX = 100


def summary(path: Path) -> dict[str, Any]:
    """What the file has; docs/reference.md describes the keys."""
    identity = identity_of(path)
    assert identity is not None
    classes: dict[str, list[int]] = {}
    data_bytes = 0
    oldest = newest = b""
    with Inspection(path) as file:
        for kept in chain(file.current(), file.ended()):
            counts = classes.setdefault(class_of(kept.data), [0, 0])
            counts[0] += 1
            counts[1] += len(kept.data)
            data_bytes += len(kept.data)
            oldest = min(oldest or kept.tid, kept.tid)
            newest = max(newest, kept.tid)
        return {
            "file": path.name,
            "database_id": identity.database_id.hex(),
            "epoch": identity.epoch,
            "file_bytes": path.stat().st_size,
            "used_bytes": file.used_bytes,
            "revisions": file.count("current") + file.count("ended"),
            "open": file.count("current"),
            "data_bytes": data_bytes,
            "oldest": _moment(oldest),
            "newest": _moment(newest),
            "valid_through": _moment(file.state.through if file.state else b""),
            "hits": file.loads().hits,
            "misses": file.loads().misses,
            "pids": file.pids(),
            "classes": {
                name: {"revisions": count, "data_bytes": size}
                for name, (count, size) in sorted(
                    classes.items(), key=lambda item: (-item[1][1], item[0])
                )
            },
        }


def findings(path: Path) -> list[str]:
    """A line for each thing that is wrong with the file."""
    try:
        with Inspection(path) as file:
            found = list(islice(file.findings(), FINDINGS_MAX + 1))
    except DamagedFile as error:
        return [str(error)]
    if len(found) > FINDINGS_MAX:
        found[FINDINGS_MAX:] = ["and there is more"]
    return found


def _moment(tid: bytes) -> dict[str, str] | None:
    if not tid:
        return None
    return {"tid": tid.hex(), "time": f"{str(TimeStamp(tid))[:19]} UTC"}


_LOOKS: dict[str, Callable[[Path], Any]] = {"summary": summary, "findings": findings}


def examine(what: str, path: Path) -> Any:
    """``summary`` or ``findings`` of ``path``, by a process of its own.

    Raises DamagedFile, also if the process comes to a bad end.
    """
    # It finds what this one has found, but not by the directory it happens to be in.
    places = os.pathsep.join(each for each in sys.path if each)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "zeolith.client.cache_report", what, path],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise DamagedFile(f"to read it ends with {name}")
    if done.returncode:
        lines = done.stderr.splitlines() or ["it cannot be read"]
        raise DamagedFile(lines[-1])
    return json.loads(done.stdout)


def main() -> None:
    """The process."""
    what, path = sys.argv[1:]
    try:
        print(json.dumps(_LOOKS[what](Path(path))))
    except (DamagedFile, lmdb.Error) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(error.strerror or str(error))


if __name__ == "__main__":
    main()
