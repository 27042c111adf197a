"""Databases on disk and in memory, as the server keeps them; no sockets here.

* ``database``   the inner interface: what a served database can do, and who may wait
* ``filestore``  a Data.fs with our own read path
* ``records``    how the records of a Data.fs are found and read
* ``log``        how the transactions of a Data.fs are listed
* ``adapted``    any other ZODB storage behind the same interface
* ``commit``     a transaction's steps: validate, resolve, store
* ``conflicts``  resolving conflicts without importing anything
* ``changes``    the recent (tid, oids) of a database
* ``identity``   database id, epoch and the oids given out, beside the data
* ``tids``       transaction ids that only grow
* ``turn``       who holds the right to vote, and who waits for it
* ``opening``    from a configuration section to an open database
"""
