"""What goes over the wire between a zeolith client and server; no I/O at all.

Bytes become messages and messages become bytes here, and a state table says which
message may come when. Nothing in this package waits, opens a socket, reads a clock
or imports a name that came from a peer. Both the server's event loop and the
client's threads drive the same code.

From the bottom up:

* ``limits``      every bound that a peer can run into, by name
* ``errors``      protocol errors, and the ZODB exceptions that may cross the wire
* ``frames``      length-prefixed frames, reassembled in linear time
* ``messages``    the eight kinds of message
* ``codec``       a message as msgpack and back
* ``loads``       the same for a load and its answer, faster
* ``methods``     the table of everything that can be asked
* ``connection``  one socket's conversation: states, open requests, heartbeats
* ``addresses``   how an address is spelled
* ``durations``   how a length of time is spelled

``README.md`` beside this file is the specification of the wire.
"""
