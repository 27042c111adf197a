from typing import Any

def answer(
    data: bytes,
    last_request: int,
    fd: int,
    buckets: Any,
    horizon: bytes,
    as_of: bytes,
    /,
) -> tuple[int, bytes] | None: ...
