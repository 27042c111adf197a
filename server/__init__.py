"""The storage server: sockets and threads around the databases of ``storage``.

One asyncio loop owns the order of things: the last tid, the list of changes, the
peers, and who may vote. It never waits for a disk, a lock or a name server; what may
wait is done in worker threads.

From the outside in:

* ``cli``        the ``zeolith`` command
* ``config``     the configuration file, checked
* ``daemon``     from options to a running server, and back to nothing
* ``interpreter`` Python's own settings for a loop among threads
* ``listener``   addresses, and one Peer for each accepted socket
* ``peer``       bytes of one socket in and out
* ``sessions``   who the peers are: a stream and its channels
* ``service``    one function for each method of the wire
* ``committer``  transactions from vote to finish, side by side and in groups
* ``patience``   how long the server waits for a client between vote and finish
* ``served``     a database as the loop sees it
* ``workers``    the threads that may wait
* ``status``     what ``zeolith status`` tells
* ``probe``      asking a server from the command line
* ``readiness``  telling systemd
"""
