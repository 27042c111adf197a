"""A round trip on a socket, with both halves: the compiled one and its twin."""

import errno
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from zeolith.client import round_trip
from zeolith.client.channel import limit_silence, shut_down
from zeolith.client.round_trip import DEAR_NS, FOUND_MAX, SKIPPED_MAX, RoundTrip
from zeolith.protocol.compiled import SWITCH
from zeolith.protocol.frames import frame

from ..support.gates import Background

COMPILED = round_trip.compiled()
REQUEST = frame(b"request")
ANSWER = frame(b"answer")
# More than a socket's buffers take.
MUCH = bytes(range(256)) * 2**16


needs_compiled = pytest.mark.skipif(
    COMPILED is None, reason="there is no compiled module"
)
# Long enough for an answer that is there, or comes from another thread.
LOOK_NS = WATCH_NS = 20_000_000


@pytest.fixture(
    params=[
        pytest.param((round_trip.exchange, 0, 0), id="twin"),
        pytest.param((COMPILED, 0, 0), id="compiled", marks=needs_compiled),
        pytest.param((COMPILED, LOOK_NS, 0), id="looking", marks=needs_compiled),
        pytest.param((COMPILED, 0, WATCH_NS), id="watching", marks=needs_compiled),
    ]
)
def exchange(request: pytest.FixtureRequest) -> Callable[[Any, Any], bytes]:
    function, *times_ns = request.param
    return lambda sock, data: function(sock, data, *times_ns)[0]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection; the first has a channel's time limits."""
    near, far = socket.socketpair()
    far.settimeout(30)
    limit_silence(near, 30)
    with near, far:
        yield near, far


def received_by(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += sock.recv(2**20)
    return data


def test_what_is_sent_arrives_and_what_came_is_returned(exchange, ends):
    near, far = ends
    far.sendall(ANSWER)
    assert exchange(near, REQUEST) == ANSWER
    assert far.recv(100) == REQUEST


def test_more_than_the_buffers_take_is_sent(exchange, ends):
    near, far = ends
    calling = Background(exchange, near, MUCH)
    assert received_by(far, len(MUCH)) == MUCH
    assert not calling.returns_soon()
    far.sendall(ANSWER)
    assert calling.result() == ANSWER


def test_other_threads_run_meanwhile(exchange, ends):
    near, far = ends
    calling = Background(exchange, near, REQUEST)
    # This thread does not get so far, if the other one keeps the interpreter.
    assert far.recv(100) == REQUEST
    far.sendall(ANSWER)
    assert calling.result() == ANSWER


def test_several_frames_come_together(exchange, ends):
    near, far = ends
    far.sendall(ANSWER + ANSWER + ANSWER[:2])
    assert exchange(near, REQUEST) == ANSWER + ANSWER + ANSWER[:2]


def test_the_beginning_of_a_large_frame_is_returned(exchange, ends):
    near, far = ends
    large = frame(bytes(2**20))
    sending = Background(far.sendall, large)
    received = exchange(near, REQUEST)
    assert 0 < len(received) < len(large)
    received += received_by(near, len(large) - len(received))
    assert received == large
    sending.result()


@needs_compiled
@pytest.mark.parametrize("times_ns", [(0, 0), (LOOK_NS, 0), (0, WATCH_NS)])
@pytest.mark.parametrize("cut_at", range(1, len(ANSWER)))
def test_the_compiled_one_returns_whole_frames(ends, cut_at, times_ns):
    near, far = ends
    assert COMPILED is not None
    far.sendall(ANSWER[:cut_at])
    calling = Background(COMPILED, near, REQUEST, *times_ns)
    assert far.recv(100) == REQUEST
    far.sendall(ANSWER[cut_at:])
    assert calling.result()[0] == ANSWER


@pytest.mark.parametrize("length", [0, 2**32 - 1])
def test_a_frame_of_no_possible_length_is_not_waited_for(exchange, ends, length):
    near, far = ends
    far.sendall(length.to_bytes(4, "big"))
    assert exchange(near, REQUEST) == length.to_bytes(4, "big")


# The end


def test_the_end_is_nothing(exchange, ends):
    near, far = ends
    far.shutdown(socket.SHUT_WR)
    assert exchange(near, REQUEST) == b""


def test_what_came_before_the_end_is_returned(exchange, ends):
    near, far = ends
    far.sendall(ANSWER[:5])
    far.shutdown(socket.SHUT_WR)
    assert exchange(near, REQUEST) == ANSWER[:5]


def test_nobody_at_the_other_end_is_an_error_and_no_signal(exchange, ends):
    near, far = ends
    far.close()
    with pytest.raises(BrokenPipeError):
        exchange(near, REQUEST)


def test_a_socket_that_is_closed_is_an_error(exchange, ends):
    near, _far = ends
    near.close()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        exchange(near, REQUEST)
    assert caught.value.errno == errno.EBADF


def test_another_thread_can_end_the_waiting(exchange, ends):
    near, far = ends
    calling = Background(exchange, near, REQUEST)
    assert far.recv(100) == REQUEST
    shut_down(near)
    assert calling.result() == b""


@pytest.mark.parametrize("begins", [b"", ANSWER[:6]])
def test_silence_is_what_it_is_for_a_socket(ends, exchange, begins):
    near, far = ends
    far.sendall(begins)
    limit_silence(near, 0.05)

    def exchange_for_ever() -> None:
        while True:
            # The twin returns what there is of a frame.
            exchange(near, b"x")

    with pytest.raises(BlockingIOError):
        exchange_for_ever()


def test_a_peer_that_reads_nothing_is_not_waited_for(exchange, ends):
    near, _far = ends
    limit_silence(near, 0.05)
    with pytest.raises(BlockingIOError):
        exchange(near, MUCH)


# Signals


class Signals:
    """What the handler of a signal does, the first time it is called."""

    def __init__(self) -> None:
        self.then: Any = None
        self._was_handled = threading.Event()

    def handle(self, _number: int, _frame: Any) -> None:
        if not self._was_handled.is_set():
            self._was_handled.set()
            self.then()

    def disturb(self) -> None:
        """Signal to the main thread until it has noticed.

        One that comes right before the thread goes to sleep does not wake it.
        """
        main = threading.main_thread().ident
        assert main is not None
        while not self._was_handled.wait(0.01):
            signal.pthread_kill(main, signal.SIGUSR1)


@pytest.fixture
def signals() -> Iterator[Signals]:
    signals = Signals()
    before = signal.signal(signal.SIGUSR1, signals.handle)
    yield signals
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_is_handled_while_the_answer_is_waited_for(exchange, ends, signals):
    near, far = ends
    signals.then = lambda: far.sendall(ANSWER)
    disturbing = Background(signals.disturb)
    assert exchange(near, REQUEST) == ANSWER
    disturbing.result()
    assert far.recv(100) == REQUEST


def test_a_handler_that_raises_ends_the_waiting(exchange, ends, signals):
    near, far = ends

    def interrupt() -> None:
        raise InterruptedError

    def disturb() -> bytes:
        data = far.recv(100)
        signals.disturb()
        return data

    signals.then = interrupt
    disturbing = Background(disturb)
    with pytest.raises(InterruptedError):
        exchange(near, REQUEST)
    assert disturbing.result() == REQUEST
    # Nothing is sent again, and the answer is still to come.
    far.sendall(ANSWER)
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    assert near.recv(100) == ANSWER


def test_a_signal_in_the_middle_of_sending_repeats_nothing(exchange, ends, signals):
    near, far = ends

    def disturb() -> bytes:
        began = far.recv(1000)
        signals.disturb()
        data = began + received_by(far, len(MUCH) - len(began))
        far.sendall(ANSWER)
        return data

    signals.then = lambda: None
    disturbing = Background(disturb)
    assert exchange(near, MUCH) == ANSWER
    assert disturbing.result() == MUCH


# Whether the interpreter is let go of


@needs_compiled
def test_an_answer_that_is_there_is_found_by_looking(ends):
    near, far = ends
    assert COMPILED is not None
    far.sendall(ANSWER)
    assert COMPILED(near, REQUEST, LOOK_NS, 0) == (ANSWER, -1, False)
    far.sendall(ANSWER)
    received, regain_ns, _is_late = COMPILED(near, REQUEST, 0, 0)
    assert received == ANSWER
    assert regain_ns >= 0


@needs_compiled
def test_no_other_thread_runs_while_an_answer_is_looked_for(ends):
    """Nor does it run at all, unless the main thread lets go of the interpreter."""
    near, far = ends
    assert COMPILED is not None
    before_s = sys.getswitchinterval()
    # Nobody takes the interpreter from a thread that does not give it.
    sys.setswitchinterval(1000)
    try:
        echoing = threading.Thread(target=lambda: far.sendall(far.recv(100) and ANSWER))
        echoing.start()
        received, regain_ns, _is_late = COMPILED(near, REQUEST, LOOK_NS, 0)
    finally:
        sys.setswitchinterval(before_s)
    echoing.join()
    assert received == ANSWER
    assert regain_ns >= 0, "it was found while it was looked for"


@needs_compiled
def test_an_answer_that_is_there_is_seen_by_watching(ends):
    near, far = ends
    assert COMPILED is not None
    far.sendall(ANSWER)
    received, regain_ns, is_late = COMPILED(near, REQUEST, 0, WATCH_NS)
    assert (received, is_late) == (ANSWER, False)
    assert regain_ns >= 0, "no other thread could run"


@needs_compiled
def test_one_that_does_not_come_in_time_is_waited_for(ends):
    near, far = ends
    assert COMPILED is not None
    calling = Background(COMPILED, near, REQUEST, 0, 1)
    assert not calling.returns_soon()
    far.sendall(ANSWER)
    received, _regain_ns, is_late = calling.result()
    assert (received, is_late) == (ANSWER, True)


@needs_compiled
@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="nobody says here who runs where"
)
def test_nobody_watches_who_keeps_others_from_their_core(ends):
    """The kernel gives the core to a process that wants it, and that is noticed."""
    near, _far = ends
    assert COMPILED is not None
    limit_silence(near, 0.001)
    cores = os.sched_getaffinity(0)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for process in (0, busy.pid):
            os.sched_setaffinity(process, {min(cores)})
        before = resource.getrusage(resource.RUSAGE_THREAD)
        with pytest.raises(BlockingIOError):
            COMPILED(near, REQUEST, 0, 500_000_000)
        after = resource.getrusage(resource.RUSAGE_THREAD)
    finally:
        os.sched_setaffinity(0, cores)
        busy.kill()
        busy.wait()
    # It might have given the core away for half a second, again and again.
    assert after.ru_nivcsw - before.ru_nivcsw < 20


class Exchanges:
    """An exchange that tells what the test wants, and writes down what is asked."""

    def __init__(self) -> None:
        self.regain_ns = 0
        self.is_late = False
        self.looks: list[int] = []
        self.watches: list[int] = []

    def __call__(
        self, _sock: Any, _data: bytes, look_ns: int, watch_ns: int
    ) -> tuple[bytes, int, bool]:
        self.looks.append(look_ns)
        self.watches.append(watch_ns)
        return ANSWER, self.regain_ns, self.is_late


@pytest.fixture
def exchanges() -> Exchanges:
    return Exchanges()


@pytest.fixture
def trip(exchanges: Exchanges) -> RoundTrip:
    return RoundTrip(socket.socket.__new__(socket.socket), exchanges)


DEAR, CHEAP, FOUND = DEAR_NS + 1, DEAR_NS, -1


def looked(exchanges: Exchanges, trip: RoundTrip, *regains_ns: int) -> list[bool]:
    """In which of some calls, with these outcomes, the answer was looked for."""
    exchanges.looks.clear()
    for regain_ns in regains_ns:
        exchanges.regain_ns = regain_ns
        assert trip(REQUEST) == ANSWER
    assert set(exchanges.looks) <= {0, round_trip.LOOK_NS}
    return [look_ns > 0 for look_ns in exchanges.looks]


def test_as_long_as_it_is_cheap_to_let_go_nobody_looks(exchanges, trip):
    regains_ns = (0, CHEAP, FOUND, DEAR, CHEAP, DEAR, CHEAP)
    assert not any(looked(exchanges, trip, *regains_ns))


def test_what_it_took_to_get_the_interpreter_back_is_told(exchanges, trip):
    for regain_ns, regained_s in ((DEAR, DEAR / 1e9), (FOUND, 0.0)):
        exchanges.regain_ns = regain_ns
        trip(REQUEST)
        assert trip.regained_s == regained_s


def test_once_it_was_dear_twice_answers_are_looked_for(exchanges, trip):
    assert looked(exchanges, trip, DEAR, DEAR, FOUND, FOUND) == [
        False,
        False,
        True,
        True,
    ]


def test_who_must_not_look_lets_go_even_then(exchanges, trip):
    looked(exchanges, trip, DEAR, DEAR)
    exchanges.looks.clear()
    trip(REQUEST, may_look=False)
    assert exchanges.looks == [0]
    assert looked(exchanges, trip, FOUND) == [True]


def test_that_ends_when_it_was_cheap_again(exchanges, trip):
    looked(exchanges, trip, DEAR, DEAR)
    assert looked(exchanges, trip, FOUND, CHEAP, 0, DEAR) == [True, True, False, False]


def test_after_many_that_were_found_it_is_tried_again(exchanges, trip):
    looked(exchanges, trip, DEAR, DEAR)
    assert all(looked(exchanges, trip, *[FOUND] * FOUND_MAX))
    assert looked(exchanges, trip, DEAR, FOUND) == [False, True]
    assert all(looked(exchanges, trip, *[FOUND] * (FOUND_MAX - 1)))
    assert looked(exchanges, trip, CHEAP, CHEAP) == [False, False]


def test_who_looks_in_vain_looks_less_and_less_often(exchanges, trip):
    """The server is far away, or waits for a core; each time is time for nobody."""
    calls = looked(exchanges, trip, *[DEAR] * 200)
    looks = [number for number, is_look in enumerate(calls) if is_look]
    skipped = [after - before - 1 for before, after in pairwise(looks)]
    assert looks[0] == 2
    assert skipped[:5] == [0, 1, 3, 7, SKIPPED_MAX]
    assert set(skipped[5:]) == {SKIPPED_MAX}


def test_one_that_is_found_makes_up_for_those_in_vain(exchanges, trip):
    looked(exchanges, trip, DEAR, DEAR)
    assert looked(exchanges, trip, DEAR, DEAR, DEAR) == [True, True, False]
    assert looked(exchanges, trip, FOUND, DEAR, DEAR) == [True] * 3


# Whether the answer is watched for


def watched(exchanges: Exchanges, trip: RoundTrip, *are_late: bool) -> list[bool]:
    """In which of some quick calls, with these outcomes, the answer was watched for."""
    exchanges.watches.clear()
    for is_late in are_late:
        exchanges.is_late = is_late
        assert trip(REQUEST, True) == ANSWER
    assert set(exchanges.watches) <= {0, round_trip.WATCH_NS}
    return [watch_ns > 0 for watch_ns in exchanges.watches]


def test_only_quick_answers_are_watched_for(exchanges, trip):
    assert watched(exchanges, trip, False, False) == [True, True]
    trip(REQUEST)
    assert exchanges.watches[-1] == 0


def test_who_watches_in_vain_watches_less_and_less_often(exchanges, trip):
    calls = watched(exchanges, trip, *[True] * 200)
    watches = [number for number, is_watch in enumerate(calls) if is_watch]
    skipped = [after - before - 1 for before, after in pairwise(watches)]
    assert skipped[:5] == [0, 1, 3, 7, SKIPPED_MAX]
    assert set(skipped[5:]) == {SKIPPED_MAX}


def test_one_that_came_in_time_makes_up_for_those_that_did_not(exchanges, trip):
    assert watched(exchanges, trip, True, True, True) == [True, True, False]
    assert watched(exchanges, trip, False, True, True) == [True] * 3


def test_who_looks_does_not_watch(exchanges, trip):
    looked(exchanges, trip, DEAR, DEAR)
    exchanges.regain_ns = FOUND
    assert watched(exchanges, trip, False) == [False]
    assert exchanges.looks[-1] == round_trip.LOOK_NS


# Which one


def test_what_is_no_socket_or_no_bytes_is_refused(exchange, ends):
    near, _far = ends
    with pytest.raises((TypeError, AttributeError)):
        exchange(object(), REQUEST)
    with pytest.raises(TypeError):
        exchange(near, "text")


class Counting(socket.socket):
    """More than a socket."""


def test_only_plain_sockets_are_used_without_their_methods():
    context = ssl.create_default_context()
    with (
        socket.socket() as plain,
        Counting() as counting,
        context.wrap_socket(socket.socket(), server_hostname="x") as encrypted,
    ):
        assert round_trip.exchange_for(plain) is (COMPILED or round_trip.exchange)
        assert round_trip.exchange_for(counting) is round_trip.exchange
        assert round_trip.exchange_for(encrypted) is round_trip.exchange_encrypted


def test_an_encrypted_socket_that_is_none_any_more_sends_nothing_plain():
    context = ssl.create_default_context()
    near, far = socket.socketpair()
    with far:
        encrypted = context.wrap_socket(
            near, server_hostname="x", do_handshake_on_connect=False
        )
        # As its close and its shutdown do, before the plain socket's.
        encrypted._sslobj = None  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="closed or unwrapped") as caught:
            round_trip.exchange_encrypted(encrypted, REQUEST, 0, 0)
        assert caught.value.errno == errno.EBADF
        encrypted.close()
        assert far.recv(1) == b""


def test_a_program_with_the_switch_uses_the_twin():
    script = (
        "from zeolith.client import round_trip, storage;"
        "assert round_trip._compiled is None"
    )
    environment = {**os.environ, SWITCH: "0"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
