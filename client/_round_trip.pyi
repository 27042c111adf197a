import socket

def exchange(
    sock: socket.socket, data: bytes, look_ns: int, watch_ns: int, /
) -> tuple[bytes, int, bool]: ...
