"""No pickle of somebody else's is loaded, but where it can do nothing."""

import ast
import json
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from BTrees.Length import Length
from BTrees.OOBTree import OOBucket
from ZODB.blob import Blob

from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.protocol.methods import METHODS

from ..support.payloads import payload_that_makes
from ..support.records import commit, current_tid, oid_of
from ..support.serving import ServerProcess
from . import auditing

ROOT = Path(__file__).parents[2]
PACKAGES = ("client", "protocol", "server", "storage")
NEVER = bytes(8)
X = oid_of("x")

# By reading the code

# Whoever is not here has nothing to do with pickles, but may name what is in `MAKING`.
LOADING = {
    # Merges states of the classes of BTrees; makes names of all classes.
    "storage/conflicts.py": {"zodbpickle.fastpickle", "zodbpickle.slowpickle"},
    # Positions and bytes of a file of the server's own; knows no class.
    "storage/index.py": {"pickle"},
    # Plain values of a transaction's extension, for whoever asks for the undo log.
    "client/extensions.py": {"ZODB._compat", "zodbpickle.slowpickle"},
}
# Modules that load pickles, and the names in them which only write, or name opcodes.
PICKLING = {
    "_pickle",
    "copyreg",
    "dill",
    "marshal",
    "pickle",
    "shelve",
    "ZODB._compat",
    "zodbpickle",
}
WRITING = {
    "dumps",
    "Pickler",
    "PersistentPickler",
    "FILESTORAGE_MAGIC",
    "_protocol",
    "DICT",
    "SETITEM",
    "SETITEMS",
}
# Functions of ZODB that load a record to look into it.
LOOKING = {"is_blob_record", "get_pickle_metadata", "referencesf", "get_refs"}
# A pack does, whose collection makes nothing of what it looks into (noload).
MAY_LOOK = {
    f"storage/{name}.py": {"referencesf"} for name in ("packer", "adapted", "feed")
}
RUNNING = {"eval", "exec", "compile", "__import__", "import_module"}
MAY_RUN = {
    # The families of BTrees, which are in its own list.
    "storage/conflicts.py": {"__import__"},
    # One that is written there, early.
    "server/keyring.py": {"import_module"},
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def _is_pickling(module: str) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in PICKLING)


def loaded_by(tree: ast.Module) -> set[str]:
    """The modules that load pickles which ``tree`` uses for more than writing."""
    found: dict[str, str] = {}
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_pickling(alias.name):
                    found[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if _is_pickling(whole) and alias.name.islower():
                    found[alias.asname or alias.name] = whole
                elif _is_pickling(node.module) and alias.name not in WRITING:
                    used.add(node.module)
            if _is_pickling(node.module):
                names = {alias.name for alias in node.names}
                if names - WRITING:
                    used.add(node.module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr not in WRITING:
            module = found.get(ast.unparse(node.value))
            if module:
                used.add(module)
    return used


def test_pickles_are_loaded_in_three_modules_only():
    found = {path: used for path, tree in modules() if (used := loaded_by(tree))}
    # It forbids it: it puts something else in the place of ZODB's.
    assert found.pop("storage/adapted.py") == {"ZODB._compat"}
    assert found == LOADING


def names_in(tree: ast.Module, wanted: set[str]) -> set[str]:
    """Those of ``wanted`` that come from elsewhere and are used."""
    own = {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}
    names = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
    imported = {
        alias.name
        for each in ast.walk(tree)
        if isinstance(each, ast.ImportFrom)
        and not (each.module or "").startswith("zeo")
        for alias in each.names
    }
    builtin = {"eval", "exec", "compile", "__import__"}
    return wanted & ((names & builtin) | imported) - own


def test_zodbs_own_ways_to_look_into_a_record_are_not_used():
    found = {
        path: names for path, tree in modules() if (names := names_in(tree, LOOKING))
    }
    assert found == MAY_LOOK


def test_nothing_is_run_or_imported_by_a_name_that_was_computed():
    found = {
        path: names for path, tree in modules() if (names := names_in(tree, RUNNING))
    }
    assert found == MAY_RUN


# By watching a server

# Where a pickle may be loaded: by the innermost file that is not an unpickler.
LOADERS = ("storage/conflicts.py", "storage/index.py")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile_states(payload: bytes) -> list[bytes]:
    """States that do something, or take something, where they are loaded."""
    deep = 20_000
    return [
        payload,
        b"cos\nsystem\n" + text("exit 1") + b"\x85R.",
        b"cthis\ns\n)\x81}b.",
        b"cBTrees.Length\nLength\n)\x81K\x01b.",
        b"\x82\x01)R.",
        b"\x84\xff\xff\xff\x7f)R.",
        b"(i" + b"os\nsystem\n.",
        b"(cos\nsystem\n" + text("exit 1") + b"o.",
        b"C\x08oid45678Q}" + text("oid") + b"K\x01" + b"2\x86" * 64 + b"sb.",
        b"cos\nsystem\nQ.",
        b"Pno reference\n.",
        b"K\x01r\xff\xff\xff\x7f.",
        b"B\xff\xff\xff\x7f.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8b\x00\x00\x01\x00" + b"\x7f" * 65536 + b".",
        b"(" * deep + b"t" * deep + b".",
        b"]" * deep + b"a" * (deep - 1) + b".",
        b"]q\x00h\x00a.",
        b"K\x01" + b"2\x86" * 64 + b"\x85.",
        text("x" * 60_000) + b"2\x86" * 18 + b"N\x86\x85.",
        b"(" + b"cos\nsystem\n" + b"N" + text("key") + b"Nt\x85.",
        b"}(" + b"K\x01N" * 2000 + b"u.",
        b"no pickle",
        b"",
    ]


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    return tmp_path / "was run"


@pytest.fixture
def payload(proof: Path) -> bytes:
    return payload_that_makes(proof)


@pytest.fixture
def audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is told of all processes that are started from now on."""
    folder = tmp_path / "first"
    folder.mkdir()
    shutil.copy(auditing.__file__, folder / "sitecustomize.py")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("AUDIT_LOG", str(tmp_path / "audit.log"))
    return tmp_path / "audit.log"


def told(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@contextmanager
def channel_of(storage: ClientStorage) -> Iterator[Any]:
    session = storage.current_session
    assert session is not None
    channel = session.borrow()
    try:
        yield channel
    finally:
        session.give_back(channel)


def send(storage: ClientStorage, *calls: tuple[Any, ...]) -> list[Any]:
    """Make calls on one channel; what fails is nobody's concern here."""
    answers = []
    with suppress(ClientDisconnected), channel_of(storage) as channel:
        for method, *args in calls:
            try:
                answers.append(channel.call(method, *args))
            except ClientDisconnected:
                raise
            except Exception as error:
                answers.append(error)
    return answers


def do_everything(storage: ClientStorage, payload: bytes) -> None:
    """Every method, with hostile bytes wherever bytes may be."""
    ids = (b"hostile%09d" % n for n in count())
    classes = [pickle.dumps(each, 3) for each in (OOBucket, Length, Blob)]
    for state in hostile_states(payload):
        for head in (b"", *(each + b"\x80\x03" for each in classes)):
            _fight_over(storage, head + state, state, ids)
    last = storage.lastTransaction()
    for name, method in METHODS.items():
        if (
            method.sender != "client"
            or not method.answers
            or name in ("finish", "pack")
        ):
            continue
        send(
            storage,
            (name, *(_worst(kind.name, payload) for _, kind in method.arguments)),
        )
    send(storage, ("undo_log", None, 100), ("history", X, 100))
    send(storage, ("transactions", None, None, None), ("records", None))
    undo = next(ids)
    send(
        storage,
        ("vote", undo, [b"", b"", payload, None, " "], [["undo", last]]),
        ("finish", undo, NEVER),
    )
    # What the collection of garbage begins with, and follows.
    _fight_over(storage, payload + payload, b"", ids, NEVER)
    for collects in (True, False):
        send(storage, ("pack", time.time() + 1, collects))


def _fight_over(
    storage: ClientStorage,
    record: bytes,
    extension: bytes,
    ids: Iterator[bytes],
    oid: bytes = X,
) -> None:
    """Commit a record twice, the second time in conflict with the first."""
    metadata = [b"user", b"description", extension[:60_000], None, " "]
    base = current_tid(storage, oid) or NEVER
    first, second, third = next(ids), next(ids), next(ids)
    data = record or b"N."
    send(
        storage,
        ("vote", first, metadata, [["store", oid, base, data]]),
        ("finish", first, NEVER),
    )
    committed = _tid_of(storage, oid)
    send(
        storage,
        ("vote", second, metadata, [["store", oid, committed, data]]),
        ("finish", second, NEVER),
        ("vote", third, metadata, [["store", oid, committed, data]]),
        ("resolve", third, [[oid, data]]),
        ("abort", third),
    )


def _tid_of(storage: ClientStorage, oid: bytes) -> bytes:
    (answer,) = send(storage, ("load", oid, b"\x7f" + b"\xff" * 7))
    return answer[1] if isinstance(answer, list) else NEVER


def _worst(kind: str, payload: bytes) -> Any:
    if kind.endswith(" or nil"):
        return _worst(kind.removesuffix(" or nil"), payload)
    if kind.startswith("list of "):
        return [_worst(kind.removeprefix("list of "), payload)]
    simple = {
        "oid": X,
        "tid": NEVER,
        "transaction id": b"t" * 16,
        "token": b"t" * 16,
        "text": "os.system",
        "count": 10,
        "bool": True,
        "time": 0.0,
        "operation": ["store", X, NEVER, payload],
        "metadata": [payload, payload, payload, None, " "],
        "[oid, tid]": [X, NEVER],
        "[oid, bytes]": [X, payload],
    }
    return simple.get(kind, payload)


@pytest.mark.timeout(120)
def test_a_server_loads_no_pickle_but_to_merge_states(
    tmp_path, audited, payload, proof
):
    with ServerProcess(tmp_path) as server:
        storage = ClientStorage(server.address)
        do_everything(storage, payload)
        storage.close()
        # A start reads the index, and whatever was committed.
        server.kill()
        (tmp_path / "Data.fs.index").write_bytes(payload)
        server.start()
        other = ClientStorage(server.address)
        commit(other, z=b"the server is as good as before")
        other.close()
    assert not proof.exists()
    events = told(audited)
    loads = [each for each in events if each["what"] == "load"]
    assert {each["where"][0] for each in loads} == {str(ROOT / it) for it in LOADERS}
    assert {each["what"] for each in events} == {"load"}, "a class was looked for"


@pytest.mark.timeout(60)
def test_who_reads_the_undo_log_runs_nothing(tmp_path, payload, proof):
    with ServerProcess(tmp_path) as server:
        storage = ClientStorage(server.address)
        metadata = [b"user", b"description", payload, None, " "]
        send(
            storage,
            ("vote", b"t" * 16, metadata, [["store", X, NEVER, payload]]),
            ("finish", b"t" * 16, NEVER),
        )
        (entry,) = storage.undoLog(0, 1)
        assert entry["description"] == b"description"
        (entry,) = storage.history(X)
        for transaction in storage.iterator():
            with suppress(ValueError):
                assert transaction.extension == {}
        storage.close()
    assert not proof.exists()


def test_the_audit_notes_what_it_is_there_for(tmp_path, audited, payload, proof):
    """A pickle that is loaded by anybody else is noted, in each of the ways."""
    program = (
        "import io, pickle, sys, zodbpickle.pickle, zodbpickle.slowpickle\n"
        "from ZODB import _compat\n"
        "data = bytes.fromhex(sys.argv[1])\n"
        "pickle.loads(data); pickle.Unpickler(io.BytesIO(data)).load()\n"
        "pickle._Unpickler(io.BytesIO(data)).load()\n"
        "zodbpickle.pickle.loads(data)\n"
        "zodbpickle.slowpickle.Unpickler(io.BytesIO(data)).load()\n"
        "_compat.Unpickler(io.BytesIO(data)).load(); _compat.loads(data)\n"
    )
    subprocess.run([sys.executable, "-c", program, payload.hex()], check=True)
    loads = [each for each in told(audited) if each["what"] == "load"]
    assert len(loads) == 7
    assert any(each["what"] == "find_class" for each in told(audited))
