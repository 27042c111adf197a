"""Two processes open the same empty database at the same moment."""

import pytest
import ZODB
from persistent.mapping import PersistentMapping
from ZODB.POSException import POSKeyError

from zeolith.client import DB
from zeolith.client.storage import ClientStorage
from zeolith.client.tids import MAX_TID, Z64, following
from zeolith.storage.filestore import FileStore

from ..support.gates import Background, Gate
from ..support.inprocess import HeldStream, client_of


def put(db: ZODB.DB, key: str) -> None:
    with db.transaction() as connection:
        connection.root()[key] = PersistentMapping()


def keys(db: ZODB.DB) -> list[str]:
    with db.transaction() as connection:
        return sorted(connection.root())


def test_of_two_who_make_the_root_both_get_the_same(server, gate, monkeypatch):
    """Both found none, and both made the same."""
    vote = ClientStorage.tpc_vote
    voters: list[ClientStorage] = []

    def vote_together(storage: ClientStorage, transaction: object) -> object:
        voters.append(storage)
        gate.pass_through()
        return vote(storage, transaction)

    monkeypatch.setattr(ClientStorage, "tpc_vote", vote_together)
    gate.shut()
    opening = [Background(DB, server.address, server_sync=True) for _ in range(2)]
    for _ in opening:
        gate.wait_until_reached()
    gate.open()
    first, second = (each.result() for each in opening)
    assert len({id(storage) for storage in voters}) == 2
    put(first, "one")
    put(second, "two")
    assert keys(second) == ["one", "two"]
    for db in (first, second):
        db.close()


def test_a_root_that_is_in_use_already_is_not_made_anew(server, gate, monkeypatch):
    """The other one has even written into it: a conflict, and not the end."""
    vote_late = gate.before(ClientStorage.tpc_vote)
    monkeypatch.setattr(ClientStorage, "tpc_vote", vote_late)
    gate.shut()
    opening = Background(DB, server.address)
    gate.wait_until_reached()
    monkeypatch.undo()
    first = DB(server.address)
    put(first, "one")
    gate.open()
    late = opening.result()
    assert keys(late) == ["one"]
    for db in (first, late):
        db.close()


def test_a_root_that_was_made_a_moment_ago_is_found(server, monkeypatch):
    """It is not in the snapshot yet: the change is still on its way."""
    connected = Gate()
    init = ClientStorage.__init__

    def slow_init(storage: ClientStorage, *args: object, **kwargs: object) -> None:
        init(storage, *args, **kwargs)  # type: ignore[arg-type]
        if kwargs.get("client_label") == "late":
            held.append(HeldStream(server, storage).hold())
            connected.pass_through()

    held: list[HeldStream] = []
    monkeypatch.setattr(ClientStorage, "__init__", slow_init)
    connected.shut()
    opening = Background(DB, server.address, client_label="late")
    connected.wait_until_reached()
    first = DB(server.address)
    put(first, "one")
    connected.open()
    late = opening.result()
    held[0].release()
    assert keys(late) == ["one"]
    put(late, "two")
    first.close()
    late.close()


def test_a_root_that_is_on_disk_and_not_announced_is_not_in_the_way(
    server, gate, monkeypatch
):
    """However often somebody tries meanwhile, it is not there, and then a conflict."""
    monkeypatch.setattr(FileStore, "append", gate.after(FileStore.append))
    gate.shut()
    opening = Background(DB, server.address)
    gate.wait_until_reached()
    with client_of(server) as storage:
        for before in (following(Z64), MAX_TID):
            with pytest.raises(POSKeyError):
                storage.loadBefore(Z64, before)
        voted = Gate()
        vote = voted.before(ClientStorage.tpc_vote)
        monkeypatch.setattr(ClientStorage, "tpc_vote", vote)
        voted.shut()
        late = Background(DB, server.address)
        # It has found no root, and will make one.
        voted.wait_until_reached()
        voted.open()
        gate.open()
        for each in (opening, late):
            db = each.result()
            assert keys(db) == []
            db.close()
