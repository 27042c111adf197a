from typing import Any

def load(
    oid: bytes, before: bytes, fd: int, buckets: Any, /
) -> tuple[bytes, bytes, None] | None: ...
def answer(
    data: bytes,
    last_request: int,
    fd: int,
    buckets: Any,
    horizon: bytes,
    as_of: bytes,
    /,
) -> tuple[int, bytes] | None: ...
