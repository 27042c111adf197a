import socket

def exchange(
    sock: socket.socket, data: bytes, look_ns: int, /
) -> tuple[bytes, int]: ...
