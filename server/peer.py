"""One accepted socket: bytes in and out of a protocol.Connection, nothing more.

Called by the loop only. What a message means is the service's business; why a socket
ends, whoever decides it, goes through ``hang_up`` and ends in ``connection_lost``, the
one place where everything that hung on the socket is let go.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from zeolith.protocol.connection import Answer, Connection, Role, State
from zeolith.protocol.limits import Limits
from zeolith.protocol.loads import REQUEST_BYTES_MAX
from zeolith.protocol.messages import Hello, Message, Notice, Request, Response
from zeolith.server.access import NOBODY, Identity
from zeolith.server.delivery import Delivery
from zeolith.server.origins import Origin, origin_of
from zeolith.server.secured import Protected
from zeolith.server.sessions import ChannelTransactions, Session
from zeolith.server.turns import Account, Waiting, clock, computed
from zeolith.storage.tids import Z64

if TYPE_CHECKING:
    from zeolith.server.blobs import Uploading
    from zeolith.server.service import Service


class Peer(Protected):
    """The server's end of one socket."""

    def __init__(self, service: "Service", limits: Limits):
        self._service = service
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self.connection = Connection(Role.SERVER, self._now(), limits)
        # Set by the service when the hello is accepted; None for a probe.
        self.session: Session | None = None
        # Who it is; the service finds out when it answers the hello.
        self.identity: Identity = NOBODY
        # The short way of a load, if its database has one; a channel has it.
        self.answer: Answer | None = None
        self.transactions = ChannelTransactions(limits, service.stock)
        # The blobs of the transaction that will vote next; a channel has it.
        self.upload: Uploading | None = None
        # The client's own address, never ours.
        self.origin = Origin("?", "?")
        self.address = self.origin.address
        self._transport: asyncio.Transport | None = None
        # Replies to one batch of requests leave in one write.
        self._batch: list[bytes] | None = None
        self._batch_bytes = 0
        # Whether it was closing at the last tick already.
        self._is_lingering = False
        # Whether more waits for it than the limit says; the transport tells.
        self.is_lagging = False
        # See Follower.
        self.told_tid = Z64
        # How many want nothing to be read now.
        self._holds = 0
        # What has been read, and waits for a turn: meanwhile nothing is read.
        self._next_turns = b""
        # What is taken of the server's time is charged to it; None: to nobody.
        self.account: Account | None = None
        # The socket's, if what is written to it is what the peer gets.
        self._fd: int | None = None
        # An answer that another thread may send.
        self._delivery: Delivery | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is accepted."""
        # uvloop's transports are of no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        limits = self._limits
        self._transport.set_write_buffer_limits(
            high=min(limits.lag_bytes_max, limits.output_bytes_max)
        )
        self.origin = origin_of(transport)
        self.address = self.origin.address
        sock = transport.get_extra_info("socket")
        if sock is not None and self.tls is None:
            self._fd = sock.fileno()
        self.account = self._service.turns.arrive(self.origin.source)
        self._service.peers.add(self)
        self._service.admission.arrive(self)

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        session = self.session
        if session is None:
            self._service.catch_up()
        elif session.served.committer.on_disk is not None:
            # Some client may know already that it is.
            session.served.committer.catch_up()
        connection = self.connection
        now = self._now()
        if self.answer is not None and len(data) <= REQUEST_BYTES_MAX:
            answered = connection.answer_at_once(data, now, self.answer)
            if answered is not None:
                self._write(answered)
                return
        if (
            self.account is None
            and int.from_bytes(data[:4], "big") + 4 == len(data)
            and not connection.is_inside_frame
            and not self._next_turns
        ):
            # One message, and nearly always so.
            self._receive(data, now)
        elif self._next_turns:
            self._next_turns += data
        elif self._has_taken_much:
            self._wait_in_line(data)
        else:
            self._look_at(data, now)

    def take_turn(self) -> None:
        """It was its turn in the line."""
        data, self._next_turns = self._next_turns, b""
        if self.is_there and not self.connection.is_closed:
            self._look_at(data, self._now())
        self.let_read()

    def puts_in_line(self, who: Waiting) -> bool:
        """Let ``who``, which acts for it, wait for a turn if it has taken much."""
        if not self._has_taken_much:
            return False
        self._service.turns.wait(who, is_guest=True)
        return True

    def charge(self, took_s: float) -> None:
        """So much of the server's time was taken for it, if anybody counts."""
        if self.account is not None:
            self.account.charge(took_s, clock())

    @property
    def _has_taken_much(self) -> bool:
        return self.account is not None and self.account.is_over(clock())

    def _wait_in_line(self, data: bytes) -> None:
        self.hold_reading()
        self._next_turns = data
        self._service.turns.wait(self, is_guest=self.account is not None)

    def _look_at(self, data: bytes, now: float) -> None:
        account = self.account
        is_one = self.connection.frame_end(data) >= len(data)
        if account is None and is_one:
            self._receive(data, now)
            return
        began_s = computed()
        left = b""
        if is_one:
            self._receive(data, now)
        else:
            left = self._begin(data, now, clock() + self._limits.turn_s)
        if account is not None:
            # He may be no guest any more.
            account.charge(computed() - began_s, clock())
        if left:
            self._wait_in_line(left)

    def _receive(self, data: bytes, now: float) -> None:
        connection = self.connection
        # One at most.
        for message in connection.receive_data(data, now):
            self._dispatch(message)
        if connection.state is State.CLOSED:
            self._give_up()

    def _begin(self, data: bytes, now: float, end_s: float) -> bytes:
        """Look at the messages in ``data`` until the time is over; what is left."""
        connection, answer = self.connection, self.answer
        start = 0
        self._batch = []
        while start < len(data) and connection.state is not State.CLOSED:
            end = connection.frame_end(data, start)
            piece = data[start:end]
            start = end
            answered = answer and connection.answer_at_once(piece, now, answer)
            if answered:
                self.send(answered)
            else:
                for message in connection.receive_data(piece, now):
                    self._dispatch(message)
            if clock() >= end_s:
                break
        self._flush()
        if connection.state is State.CLOSED:
            self._give_up()
            return b""
        return data[start:]

    def pause_writing(self) -> None:
        """It does not read as fast as it is written to."""
        self.is_lagging = True

    def resume_writing(self) -> None:
        """It has read most of what waited for it."""
        self.is_lagging = False
        if self.session is not None:
            # A channel has missed nothing.
            self.session.served.catch_up(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, for whatever reason."""
        if self._delivery is not None:
            self._delivery.take_back()
        self._transport = None
        self._service.lost(self)

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The encryption of the socket, if there is any."""
        transport = self._transport
        return None if transport is None else transport.get_extra_info("ssl_object")

    @property
    def is_there(self) -> bool:
        """Whether the socket is open in both directions, as far as is known."""
        transport = self._transport
        return transport is not None and not transport.is_closing()

    def welcome(self, fields: dict[str, Any]) -> None:
        """Answer its hello; see methods.WELCOME for ``fields``."""
        self._service.admission.welcome(self)
        self.send(self.connection.welcome(fields, self._now()))
        session = self.session
        if session is not None and not session.is_read_only:
            self.account = None
            return
        if session is not None:
            self.account = session.account
        self.connection.bound_frames(
            self._limits.reader_frame_bytes_max, "reader_frame_bytes_max"
        )

    def reply(self, number: int, value: Any) -> None:
        """Answer request ``number``; harmless when the socket is gone."""
        connection = self.connection
        if connection.is_open:
            self.send(connection.reply(number, value, self._now()))

    def fail(self, number: int, error: BaseException) -> None:
        """Answer request ``number`` with an error."""
        if self.connection.is_open:
            self.send(self.connection.failure(number, error, self._now()))

    def send(self, data: bytes) -> None:
        """Send bytes that the connection made."""
        if self._batch is None:
            self._write(data)
        else:
            self._batch.append(data)
            self._batch_bytes += len(data)
            if self._batch_bytes > self._limits.batch_bytes_max:
                # From here on each is written, and the bound for output is heeded.
                self._flush()

    def offer(
        self, number: int, after_tid: bytes, make: Callable[[bytes], bytes]
    ) -> Delivery | None:
        """An answer that the writer thread may send, or None; see Delivery.

        ``was_delivered`` must follow.
        """
        transport, fd = self._transport, self._fd
        if (
            transport is None
            or fd is None
            or transport.is_closing()
            or transport.get_write_buffer_size()
        ):
            return None
        self._delivery = Delivery(
            number, fd, after_tid, make, self._limits.frame_bytes_max
        )
        return self._delivery

    def was_delivered(self, number: int) -> bool:
        """Whether the answer to request ``number`` need not be sent any more."""
        delivery = self._delivery
        if delivery is None or delivery.number != number:
            return False
        self._take_back(delivery)
        self._delivery = None
        if delivery.was_sent:
            self.connection.answered(number, self._now())
        return delivery.was_sent

    def _take_back(self, delivery: Delivery) -> None:
        rest = delivery.take_back()
        transport = self._transport
        if rest and transport is not None and not transport.is_closing():
            transport.write(rest)

    def send_shared(self, data: bytes) -> None:
        """Send bytes that were made once for many peers."""
        self.connection.sent_shared(self._now())
        self._write(data)

    def complain(self, text: str) -> None:
        """Log ``text`` behind its address, unless something was logged just now."""
        self._service.admission.complain(self, text)

    def fall_behind(self) -> None:
        """A stream that cannot be told any more what it has missed: hang up."""
        reason = "it reads too slowly, and what it missed is too long ago"
        self.complain(f"is disconnected: {reason}")
        self.hang_up("behind", reason)

    def tick(self, now: float) -> None:
        """Send a heartbeat if one is due; give up a peer that was silent too long."""
        transport = self._transport
        if transport is not None and transport.is_closing():
            # Whoever does not read its last words must not be kept for them.
            if self._is_lingering:
                transport.abort()
            self._is_lingering = True
            return
        if self._holds:
            # It is not the client that is silent.
            self.connection.rcvd_at = now
        data = self.connection.tick(now)
        if data:
            self._write(data)
        elif self.connection.is_closed:
            self._give_up()

    def expire(self, now: float, timeout_s: float) -> bool:
        """Keep nothing for a vote to come that is not heard of any more; true if so.

        Only what belongs to it counts, not whatever else the client says: records,
        chunks of blobs, and a frame that takes long on a slow line.
        """
        connection = self.connection
        held = [each for each in (self.transactions.staged, self.upload) if each]
        idle = [each for each in held if each.is_idle]
        if not idle or any(each.is_writing for each in held):
            return False
        heard_at = max(each.touched_at for each in held)
        if connection.is_inside_frame:
            heard_at = max(heard_at, connection.rcvd_at)
        if now - heard_at < timeout_s:
            return False
        for each in idle:
            each.expire(timeout_s)
        return True

    def hang_up(self, reason: str, text: str = "") -> None:
        """Say why, and close; harmless when that happened already."""
        transport = self._transport
        if transport is not None and not transport.is_closing():
            self._flush()
            now = self._now()
            self._write(self.connection.goodbye(reason, text or reason, now))
            transport.close()

    def hold_reading(self) -> None:
        """Read no more until ``let_read`` was called as often.

        The client gets no further than the buffers meanwhile.
        """
        self._holds += 1
        transport = self._transport
        if self._holds == 1 and transport is not None and not transport.is_closing():
            transport.pause_reading()

    def let_read(self) -> None:
        """Take back one ``hold_reading``."""
        assert self._holds, "nobody holds"
        self._holds -= 1
        transport = self._transport
        if self._holds == 0 and transport is not None and not transport.is_closing():
            # It was not the client that was silent.
            self.connection.rcvd_at = self._now()
            transport.resume_reading()

    def cut_off(self) -> None:
        """Close without a word, and without waiting for what is not sent yet."""
        if self._transport is not None:
            self._transport.abort()

    def _dispatch(self, message: Message) -> None:
        if type(message) is Request:
            self._service.request(self, message)
        elif type(message) is Notice:
            self._service.notice(self, message)
        elif type(message) is Response and not self.connection.is_closed:
            self._service.response(self, message.text)
        elif type(message) is Hello and not self.connection.is_closed:
            # Closed: something came behind it that did not wait for the welcome.
            self._service.hello(self, message.fields)

    def _give_up(self) -> None:
        """The conversation is over: by the peer's goodbye, or by its offence."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        error = self.connection.error
        if error is not None and self.connection.goodbye_rcvd is None:
            self.complain(f"is disconnected: {error}")
            self._write(self.connection.farewell())
        transport.close()

    def _flush(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, None, 0
        if batch:
            self._write(b"".join(batch) if len(batch) > 1 else batch[0])

    def _write(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing() or not data:
            return
        if self._delivery is not None:
            self._take_back(self._delivery)
        if (
            self.is_lagging
            and transport.get_write_buffer_size() > self._limits.output_bytes_max
        ):
            waiting = transport.get_write_buffer_size()
            self.complain(
                f"is disconnected: it does not read, {waiting} bytes wait for it"
                " (output_bytes_max)"
            )
            transport.abort()
            return
        transport.write(data)
