"""A TCP proxy with bad habits, to stand between a client and a server.

One thread accepts, two threads a connection forward. The test's thread tells it what
to do; every order holds for all connections, those included that come later (but
`cut` and `cut_after`).
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum

CHUNK_BYTES = 65536


class Direction(Enum):
    """Where bytes are going."""

    TO_SERVER = "to server"
    TO_CLIENT = "to client"


class _Link:
    """One connection through the proxy: two sockets, two threads."""

    def __init__(self, proxy: "Proxy", client: socket.socket, server: socket.socket):
        self.client = client
        self.server = server
        # Then what comes is taken and goes nowhere, the end included.
        self.is_silent = False
        self._open_pumps = 2
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._pump, args=(proxy, source, target, way))
            for source, target, way in (
                (client, server, Direction.TO_SERVER),
                (server, client, Direction.TO_CLIENT),
            )
        ]
        for thread in self._threads:
            thread.start()

    def cut(self) -> None:
        hang_up(self.client)
        hang_up(self.server)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _pump(
        self,
        proxy: "Proxy",
        source: socket.socket,
        target: socket.socket,
        way: Direction,
    ) -> None:
        # An error here is a socket that one of the three has closed.
        with suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                if proxy.wait_for_passage(way):
                    chunk += received_meanwhile(source)
                if self.is_silent:
                    continue
                allowed, is_the_last = proxy.admit(way, chunk)
                proxy.send(way, target, allowed)
                if is_the_last:
                    proxy.cut()
                    proxy.was_cut.set()
        # The end passes, and waits, like everything else; what was on its way when one
        # end closed arrives at the other before it.
        proxy.wait_for_passage(way)
        if self.is_silent:
            proxy.wait_for_end()
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            source.shutdown(socket.SHUT_RD)
        with self._lock:
            self._open_pumps -= 1
            is_last = not self._open_pumps
        if is_last:
            proxy.forget(self)
            self.client.close()
            self.server.close()


class Proxy:
    """Forwards what comes to `address` to `target`, until it is told not to."""

    def __init__(self, target: tuple[str, int]):
        self._target = target
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        # Set while bytes may pass in a direction.
        self._open = {way: threading.Event() for way in Direction}
        # How many threads hold bytes back, waiting for the passage to open.
        self._waiting = dict.fromkeys(Direction, 0)
        # How many more bytes may pass before everything is cut.
        self._budget_bytes: dict[Direction, int | None] = dict.fromkeys(Direction)
        # How much is sent at once that way, and how long (seconds) to wait after it.
        self._slow: dict[Direction, tuple[int, float] | None] = dict.fromkeys(Direction)
        # Set when those that were silenced may end; `end_silence` renews it.
        self._end_of_silence = threading.Event()
        # Set when a budget is used up; `cut_after` clears it.
        self.was_cut = threading.Event()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self.address = ("127.0.0.1", 0)

    def start(self) -> None:
        for passage in self._open.values():
            passage.set()
        self._listen()

    def close(self) -> None:
        self.refuse()
        links = self.cut()
        self.restore_passage()
        # For those, too, that come to their end only now.
        self._end_of_silence.set()
        for link in links:
            link.join()

    def cut(self) -> list[_Link]:
        """Close every connection, at both ends; returns those."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut()
        return links

    def cut_clients(self) -> None:
        """Close every connection at the client's end; what it sent still arrives."""
        with self._lock:
            links = list(self._links)
        for link in links:
            hang_up(link.client)

    def cut_after(self, size_bytes: int, way: Direction) -> None:
        """Cut everything when that many bytes more have passed that way."""
        with self._lock:
            self.was_cut.clear()
            self._budget_bytes[way] = size_bytes

    def stall(self, *ways: Direction) -> None:
        """Forward nothing any more in these directions, by default in both."""
        for way in ways or Direction:
            self._open[way].clear()

    def silence(self) -> int:
        """Swallow what comes on the connections that are there; returns how many.

        Neither end hears of it, nor of the end of the other, until `end_silence`.
        Connections that come later are as any other.
        """
        with self._lock:
            links = list(self._links)
        for link in links:
            link.is_silent = True
        return len(links)

    def end_silence(self) -> None:
        """Close the connections that were silenced and were closed at one end."""
        ended, self._end_of_silence = self._end_of_silence, threading.Event()
        ended.set()

    def slow_down(self, way: Direction, size_bytes: int, pause_s: float) -> None:
        """Forward no more than that at once that way, with a pause after it."""
        self._slow[way] = size_bytes, pause_s

    def refuse(self) -> None:
        """Accept no new connections; those that are there go on."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        # Nothing but a connection wakes an accept() everywhere.
        socket.create_connection(self.address).close()
        assert self._acceptor is not None
        self._acceptor.join()
        listener.close()

    def restore(self) -> None:
        """Behave."""
        self.restore_passage()
        if self._listener is None:
            self._listen()

    def restore_passage(self) -> None:
        """Forward again what comes, without limit."""
        with self._lock:
            self._budget_bytes = dict.fromkeys(Direction)
            self._slow = dict.fromkeys(Direction)
        for passage in self._open.values():
            passage.set()

    def connections(self) -> int:
        with self._lock:
            return len(self._links)

    def held_back(self, way: Direction) -> bool:
        """Whether bytes wait here because of a stall."""
        with self._lock:
            return self._waiting[way] > 0

    def is_cut_due(self) -> bool:
        """Whether a `cut_after` is still to come."""
        with self._lock:
            return any(budget is not None for budget in self._budget_bytes.values())

    # For the threads of a link.

    def wait_for_passage(self, way: Direction) -> bool:
        """Return when bytes may pass; says whether they had to wait."""
        if self._open[way].is_set():
            return False
        with self._lock:
            self._waiting[way] += 1
        self._open[way].wait()
        with self._lock:
            self._waiting[way] -= 1
        return True

    def admit(self, way: Direction, chunk: bytes) -> tuple[bytes, bool]:
        """How much of `chunk` may pass, and whether to cut everything after it."""
        with self._lock:
            budget = self._budget_bytes[way]
            if budget is None:
                return chunk, False
            if len(chunk) < budget:
                self._budget_bytes[way] = budget - len(chunk)
                return chunk, False
            self._budget_bytes[way] = None
            return chunk[:budget], True

    def send(self, way: Direction, target: socket.socket, data: bytes) -> None:
        """Send all of ``data``, as slowly as was said."""
        slow = self._slow[way]
        if slow is None:
            target.sendall(data)
            return
        size_bytes, pause_s = slow
        for start in range(0, len(data), size_bytes):
            target.sendall(data[start : start + size_bytes])
            time.sleep(pause_s)

    def wait_for_end(self) -> None:
        """Return when connections that were silenced may end."""
        self._end_of_silence.wait()

    def forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)

    def _listen(self) -> None:
        self._listener = socket.create_server(self.address)
        self.address = self._listener.getsockname()
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,))
        self._acceptor.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _address = listener.accept()
            if listener is not self._listener:
                client.close()
                return
            self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._links.add(_Link(self, client, server))


def received_meanwhile(sock: socket.socket) -> bytes:
    """What can be received without waiting: it is forwarded in one piece."""
    pieces = []
    with suppress(BlockingIOError):
        while piece := sock.recv(CHUNK_BYTES, socket.MSG_DONTWAIT):
            pieces.append(piece)
    return b"".join(pieces)


def hang_up(sock: socket.socket) -> None:
    """Wake the threads that use the socket, which closing it would not do."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxied(target: tuple[str, int]) -> Iterator[Proxy]:
    """A running proxy in front of `target`."""
    proxy = Proxy(target)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.close()
