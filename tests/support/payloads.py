"""A pickle that runs code when it is loaded, to show that nobody loads it."""

import pickle
from pathlib import Path
from typing import Any


class _Payload:
    """What is unpickled into an action: to make a file."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> Any:
        # The comment is what those look for who want to know whether it is a blob.
        return eval, (f"open({str(self._path)!r}, 'w').close()  # ZODB.blob",)


def payload_that_makes(proof: Path) -> bytes:
    """A pickle that makes the file ``proof``; it was tried, and the file is gone."""
    pickled = pickle.dumps(_Payload(proof), 2)
    pickle.loads(pickled)
    assert proof.exists(), "a payload that does nothing proves nothing"
    proof.unlink()
    return pickled
