"""Every bound that a peer can run into, by name.

A server or a client may be given other limits (tests do); ``DEFAULT`` is what runs
in production. Pure data, shared by all threads.
"""

from dataclasses import dataclass

# What the largest message has beside its data: user, description and extension of a
# transaction, 64 KiB each in a Data.fs, and what little msgpack adds.
ENVELOPE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one end of the wire. Sizes in bytes, times in seconds."""

    # Sockets that a server has open at once: in all, with one host (of IPv6: one /64
    # network; of a Unix socket: one user), and those that were not welcomed yet.
    connections_max: int = 10_000
    address_connections_max: int = 4000
    unwelcomed_connections_max: int = 1000
    # Before the hello is accepted nothing is known about the peer; a hello with the
    # longest names we allow takes less than 2 KiB.
    hello_frame_bytes_max: int = 16 * 1024
    # The elements of an array in it.
    hello_items_max: int = 64
    # All that it may send until it is welcomed.
    hello_bytes_max: int = 64 * 1024
    # A record may be as large as a frame less ENVELOPE_BYTES; ZODB warns at 16 MB.
    frame_bytes_max: int = 256 * 1024 * 1024
    # From accepting a socket to its hello, the handshake of TLS included.
    hello_timeout_s: float = 10.0
    # Each message of a login, which is looked at one character after the other.
    login_chars_max: int = 1024
    # The elements of an array that a client sends. Those of a batch take 64 bytes each.
    array_items_max: int = 100_000
    # Of a client that cannot write: thousands of oids, and no records. To make objects
    # of it takes a millisecond or two, whatever it is.
    reader_frame_bytes_max: int = 32 * 1024
    # How long a client's messages are looked at before it is the others' turn; one of
    # them in any case.
    turn_s: float = 0.0001
    # What the server does at once for a client that cannot write or is not welcomed,
    # before it waits in line.
    guest_burst_s: float = 0.005
    # Requests of one socket that are not answered yet.
    requests_open_max: int = 1000
    # Heartbeats of a client between two ticks of the server's clock; one is due in
    # some seconds.
    heartbeats_max: int = 100
    # Frames larger than this are not put together from many stores by the client, and
    # no part of a blob is.
    batch_bytes_max: int = 1024 * 1024
    # Channels of one session that a server accepts, and so its transactions.
    session_channels_max: int = 1000
    # Records that a server keeps until the vote, of all transactions together, of one,
    # and how many of these in memory. As much again may be on its way to the disk.
    staged_bytes_max: int = 16 * 1024 * 1024 * 1024
    transaction_bytes_max: int = 2 * 1024 * 1024 * 1024
    staged_memory_bytes_max: int = 4 * 1024 * 1024
    # When all transactions together have so much in memory, each keeps only a little.
    all_staged_memory_bytes_max: int = 256 * 1024 * 1024
    # Blobs of one transaction, and what is sent of them.
    transaction_blobs_max: int = 100_000
    transaction_blob_bytes_max: int = 1024 * 1024 * 1024 * 1024
    # Of a peer's blobs, what may wait for the disk before its socket is not read.
    blob_backlog_bytes_max: int = 4 * 1024 * 1024
    # What may wait for a peer that does not read before it is disconnected.
    output_bytes_max: int = 64 * 1024 * 1024
    # What may wait for a session's stream before changes are not sent to it one by one:
    # they are gathered, and what has come together goes when it has read.
    lag_bytes_max: int = 64 * 1024
    # Changes are told in notices of about so many oids.
    notice_oids_max: int = 50_000
    # And of not more than so many changes: a few milliseconds of the server's.
    notice_changes_max: int = 5000
    # Each end says something at least this often on a socket that has reason to live.
    heartbeat_interval_s: float = 5.0
    # A peer that was silent for so long is gone.
    heartbeat_timeout_s: float = 20.0
    # Channels of one session that a client uses for calls at once; a thread that needs
    # one more waits. Those of transactions in a commit do not count.
    channels_max: int = 100
    # One to whom the server refuses one more waits so long for another's.
    channel_wait_s: float = 10.0
    # A client closes a channel that it did not need for so long.
    channel_idle_s: float = 60.0
    # Oids handed out by one request.
    new_oids_max: int = 10_000
    # Records loaded, and transactions listed, by one request.
    load_many_max: int = 2000
    # Of these, how many are answered: the loop works on them for two milliseconds, in
    # which nobody else is answered.
    load_many_answered_max: int = 400
    # Records loaded by one request that looks ahead, and as many that these are linked
    # with; a client asks for less.
    load_ahead_max: int = 150
    log_entries_max: int = 1000
    # Revisions that one request verifies, and tids among which one finds the last that
    # the server knows.
    verify_max: int = 1000
    last_known_max: int = 1000

    @property
    def record_bytes_max(self) -> int:
        """The largest record that fits into a frame."""
        return self.frame_bytes_max - ENVELOPE_BYTES

    def __post_init__(self) -> None:
        assert self.hello_frame_bytes_max <= self.hello_bytes_max
        assert self.hello_frame_bytes_max <= self.frame_bytes_max < 2**32
        assert self.batch_bytes_max <= self.frame_bytes_max
        # Two beats may be lost to a stalled machine before the third one counts.
        assert self.heartbeat_timeout_s >= 3 * self.heartbeat_interval_s


DEFAULT = Limits()
