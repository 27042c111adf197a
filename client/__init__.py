"""The client: a ZODB storage whose data are in a zeolith server.

::

    import transaction
    from zeolith.client import connection

    conn = connection("127.0.0.1:8100")
    conn.root()["visits"] = 1
    transaction.commit()

* ``storage``    ClientStorage, ZODB's interfaces
* ``opening``    DB() and connection()
* ``connector``  keeps a session: dials, adopts, listens, begins again
* ``session``    one presence at one server: a stream and channels
* ``pool``       as many channels as there are threads that call
* ``channel``    one socket for calls
* ``round_trip`` sending a request and receiving the answer, in C or in Python
* ``loading``    many objects at once
* ``dial``       addresses and the hello
* ``position``   the one who applies changes, in order
* ``commit``     one transaction from begin to its end
* ``stores``     what it wants to write
* ``log``        undo logs and histories in ZODB's form
* ``extensions`` what transactions say of themselves
* ``cache``      revisions and the snapshots they are good for; one in memory
* ``disk_cache`` one that the processes of a host share; it is a client of
  ``cache_place``, ``cache_file`` (LMDB), ``cache_eviction``, ``cache_backlog``,
  ``cache_writer``
* ``warming``    what was used most, loaded again after everything was dropped
* ``cache_stats``  how it does
* ``cache_trace``  what it is asked for, in a file
* ``cache_simulation``  what a cache of another size would have done with that
* ``config``     the <zeolith> section of a ZODB configuration
* ``uri``        zeolith:// for zodburi
* ``errors``     what an application may have to catch
"""

from zeolith.client.opening import DB, connection
from zeolith.client.storage import ClientStorage

__all__ = ["DB", "ClientStorage", "connection"]
