"""Databases on disk and in memory, as the server keeps them; no sockets here.

* ``database``   the inner interface: what a served database can do, and who may wait
* ``filestore``  a Data.fs with our own read path
* ``records``    how the records of a Data.fs are found and read
* ``log``        how the transactions of a Data.fs are listed
* ``adapted``    any other ZODB storage behind the same interface
* ``locks``      who may vote: a transaction and the objects that it needs
* ``validation`` whether a transaction fits what was committed since it began
* ``plain``      the operations of a transaction that only stores and checks, by columns
* ``preparing``  the vote of a transaction that is written later, beside others
* ``appending``  transactions that finish together, to the end of a Data.fs
* ``commit``     the steps of a transaction that is alone, through its storage
* ``conflicts``  resolving conflicts without importing anything
* ``opcodes``    which records a fast unpickler may load
* ``disk``       the system calls of an append
* ``room``       what the disk has promised to those who have voted
* ``recent``     what clients call the last transactions, over a restart
* ``changes``    the recent (tid, oids) of a database
* ``identity``   database id, epoch and the oids given out, beside the data
* ``tids``       transaction ids that only grow
* ``opening``    from a configuration section to an open database
"""
