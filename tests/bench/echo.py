"""A server that does nothing: it answers some bytes with as many as a load brings.

Run by path, as a process of its own; prints its port. A round trip to it is what the
machine takes for itself out of each load.
"""

import socket

REQUEST_BYTES = 40
ANSWER = bytes(540)


def main() -> None:
    """Serve one client after the other, for ever."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _address = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client:
            while client.recv(4096):
                client.sendall(ANSWER)


if __name__ == "__main__":
    main()
