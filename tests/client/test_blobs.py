"""The files of blobs: the cache of a host and the server's own directory."""

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading

import pytest
from ZODB.blob import Blob, BlobFile, FilesystemHelper
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from zeolith.client import blob_directory, blobs
from zeolith.client.blob_cleaner import Bound, clean
from zeolith.client.blob_directory import BlobDirectory
from zeolith.client.blobs import BlobCache, SharedBlobs
from zeolith.client.file_locks import open_lockable, release, try_lock

from ..support.gates import Background, Gate
from ..support.waiting import wait_until

OID, TID = p64(0x1234), p64(5)


class Server:
    """What is fetched: the bytes of a revision say which one it is."""

    def __init__(self, size=1000):
        self.size = size
        self.fetched = []
        self.gate = Gate()
        self.error = None

    def data(self, oid, tid):
        return (oid + tid) * (self.size // 16)

    def fetch(self, oid, tid, file):
        self.fetched.append((oid, tid))
        data = self.data(oid, tid)
        file.write(data[:100])
        self.gate.pass_through()
        if self.error is not None:
            raise self.error
        file.write(data[100:])


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def directory(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def cache(directory):
    cache = BlobCache(directory)
    yield cache
    cache.close()


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def parts(directory):
    return os.listdir(os.path.join(directory, "parts"))


def test_a_blob_is_downloaded_once_and_found_again(cache, server, directory):
    path = cache.path_of(OID, TID, server.fetch)
    assert read(path) == server.data(OID, TID)
    assert mode(path) == 0o400
    assert cache.path_of(OID, TID, server.fetch) == path
    assert BlobCache(directory).path_of(OID, TID, server.fetch) == path
    assert server.fetched == [(OID, TID)]
    assert parts(directory) == []


def test_revisions_have_files_of_their_own(cache, server):
    for tid in (p64(1), p64(2)):
        assert read(cache.path_of(OID, tid, server.fetch)) == server.data(OID, tid)


def test_an_empty_blob_is_a_blob(cache):
    path = cache.path_of(OID, TID, lambda oid, tid, file: None)
    assert read(path) == b""


def test_a_blob_is_opened_as_what_zodb_expects(cache, server):
    blob = Blob()
    with cache.open(OID, TID, blob, server.fetch) as file:
        assert isinstance(file, BlobFile)
        assert file.blob is blob
        assert file.read() == server.data(OID, TID)
        assert file.name == cache.path_of(OID, TID, server.fetch)
    with cache.open(OID, TID, None, server.fetch) as file:
        assert not isinstance(file, BlobFile)
        assert file.read() == server.data(OID, TID)
    assert len(server.fetched) == 1


def test_what_was_written_in_pieces_and_out_of_order_arrives(cache):
    def fetch(oid, tid, file):
        file.seek(3)
        file.write(memoryview(b"def"))
        file.seek(0)
        assert file.write(b"abc") == 3

    assert read(cache.path_of(OID, TID, fetch)) == b"abcdef"


@pytest.mark.parametrize(
    "error", [POSKeyError(OID), ConnectionResetError("lost"), KeyboardInterrupt()]
)
def test_a_failed_download_leaves_nothing(cache, server, directory, error):
    server.error = error
    with pytest.raises(type(error)) as raised:
        cache.path_of(OID, TID, server.fetch)
    assert raised.value is error
    assert parts(directory) == []
    assert not os.path.exists(BlobDirectory(directory).blob_path(OID, TID))
    server.error = None
    assert read(cache.path_of(OID, TID, server.fetch)) == server.data(OID, TID)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_leaves_nothing(cache, server, directory, number):
    server.error = OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="no room for a blob in the cache") as raised:
        cache.path_of(OID, TID, server.fetch)
    assert raised.value.errno == number
    assert raised.value.filename == BlobDirectory(directory).blob_path(OID, TID)
    assert parts(directory) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_device_that_is_full_fails_the_write_itself():
    with (
        open("/dev/full", "wb") as full,
        blobs._Part(full.fileno()) as file,
        pytest.raises(OSError, match="No space left"),
    ):
        file.write(b"data")


def test_where_a_reboot_cannot_be_seen_files_are_synced(directory, server, monkeypatch):
    synced = []
    monkeypatch.setattr(blob_directory, "_BOOT_ID", "/nowhere/at/all")
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    BlobCache(directory).path_of(OID, TID, server.fetch)
    assert synced == [len(server.data(OID, TID))]


def test_a_file_is_not_visible_before_it_is_whole(cache, server, directory):
    server.gate.shut()
    download = Background(cache.path_of, OID, TID, server.fetch)
    server.gate.wait_until_reached()
    assert not os.path.exists(BlobDirectory(directory).blob_path(OID, TID))
    assert len(parts(directory)) == 1
    server.gate.open()
    assert read(download.result()) == server.data(OID, TID)


def test_threads_that_want_the_same_blob_download_it_once(cache, server, directory):
    server.gate.shut()
    wanted = [Background(cache.path_of, OID, TID, server.fetch) for _ in range(8)]
    other = BlobCache(directory)
    wanted += [Background(other.path_of, OID, TID, server.fetch) for _ in range(2)]
    server.gate.wait_until_reached()
    assert not any(each.returns_soon() for each in wanted)
    server.gate.open()
    assert len({each.result() for each in wanted}) == 1
    assert len(server.fetched) == 1


def test_a_blob_does_not_wait_for_another_one(cache, server):
    server.gate.shut()
    slow = Background(cache.path_of, OID, TID, server.fetch)
    server.gate.wait_until_reached()
    cache.path_of(OID, p64(6), Server().fetch)
    server.gate.open()
    slow.result()


def test_when_a_download_fails_the_next_in_line_tries(cache, server):
    server.gate.shut()
    server.error = ConnectionResetError("lost")
    first = Background(cache.path_of, OID, TID, server.fetch)
    server.gate.wait_until_reached()
    good = Server()
    second = Background(cache.path_of, OID, TID, good.fetch)
    assert not second.returns_soon()
    server.gate.open()
    assert first.error() is server.error
    assert read(second.result()) == good.data(OID, TID)


def test_a_download_that_stands_still_is_not_waited_for(
    cache, server, directory, monkeypatch
):
    monkeypatch.setattr(blobs, "STALLED_S", 0.05)
    server.gate.shut()
    stuck = Background(cache.path_of, OID, TID, server.fetch)
    server.gate.wait_until_reached()
    good = Server()
    path = cache.path_of(OID, TID, good.fetch)
    assert read(path) == server.data(OID, TID)
    server.gate.open()
    assert stuck.result() == path
    assert read(path) == server.data(OID, TID)
    assert parts(directory) == []


DOWNLOADER = """
import sys
from zeolith.client.blobs import BlobCache
from ZODB.utils import p64
def fetch(oid, tid, file):
    file.write(b"half")
    print("started", flush=True)
    sys.stdin.readline()
    file.write(b" and whole")
print(BlobCache(sys.argv[1]).path_of(p64(0x1234), p64(5), fetch), flush=True)
"""


@pytest.fixture
def downloader(directory):
    """Another process, which has half of the blob and waits."""
    BlobCache(directory).close()
    process = subprocess.Popen(
        [sys.executable, "-c", DOWNLOADER, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        yield process
        process.kill()


def test_processes_that_want_the_same_blob_download_it_once(cache, server, downloader):
    waiting = Background(cache.path_of, OID, TID, server.fetch)
    assert not waiting.returns_soon()
    out, _nothing = downloader.communicate(b"\n")
    assert out.decode().strip() == waiting.result()
    assert read(waiting.result()) == b"half and whole"
    assert server.fetched == []


def test_a_killed_downloader_wedges_nobody(cache, server, downloader, directory):
    waiting = Background(cache.path_of, OID, TID, server.fetch)
    assert not waiting.returns_soon()
    downloader.send_signal(signal.SIGKILL)
    assert read(waiting.result()) == server.data(OID, TID)
    assert parts(directory) == []


def test_the_half_of_a_killed_downloader_is_tidied_away(downloader, directory):
    downloader.send_signal(signal.SIGKILL)
    downloader.wait()
    assert len(parts(directory)) == 1
    BlobCache(directory)
    assert parts(directory) == []


def test_nothing_of_what_a_killed_downloader_wrote_stays(cache, directory):
    part = BlobDirectory(directory).part_path(OID, TID)
    with open(part, "wb") as file:
        file.write(b"longer than the blob")
    path = cache.path_of(OID, TID, lambda oid, tid, file: file.write(b"blob"))
    assert read(path) == b"blob"


def test_a_part_that_is_tidied_away_before_it_is_locked_is_made_again(
    cache, server, monkeypatch
):
    gate = Gate()
    gate.shut()
    with monkeypatch.context() as patched:
        patched.setattr(blobs, "try_lock", gate.before(try_lock))
        download = Background(cache.path_of, OID, TID, server.fetch)
        gate.wait_until_reached()
        cache._directory.remove_leftovers()
        gate.open()
        assert read(download.result()) == server.data(OID, TID)


def test_who_comes_after_the_download_has_ended_downloads_nothing(
    cache, server, monkeypatch
):
    """It had opened a part file before, which is the blob by now, or a new one."""
    gate = Gate()
    gate.shut()
    with monkeypatch.context() as patched:
        patched.setattr(blobs, "open_lockable", gate.before(open_lockable))
        late = Background(cache.path_of, OID, TID, server.fetch)
        gate.wait_until_reached()
        patched.undo()
        path = cache.path_of(OID, TID, server.fetch)
        gate.open()
        assert late.result() == path
    assert len(server.fetched) == 1


def test_somebody_may_remove_everything_at_any_time(cache, server, directory):
    cache.path_of(OID, TID, server.fetch)
    os.rename(directory, directory + ".old")
    assert read(cache.path_of(OID, TID, server.fetch)) == server.data(OID, TID)
    server.gate.shut()
    download = Background(cache.path_of, OID, p64(6), server.fetch)
    server.gate.wait_until_reached()
    os.rename(directory, directory + ".older")
    server.gate.open()
    assert read(download.result()) == server.data(OID, p64(6))
    os.rename(directory, directory + ".oldest")
    assert os.path.isdir(cache.temporary_directory())


# The cleaner of another process.


def test_a_file_that_goes_between_download_and_open_is_no_error(
    cache, server, monkeypatch
):
    """First of all: it is found, and is gone when it is opened."""
    cache.path_of(OID, TID, server.fetch)
    gate = Gate()
    gate.shut()
    with monkeypatch.context() as patched:
        patched.setattr(blobs, "_opened", gate.before(blobs._opened))
        opening = Background(cache.open, OID, TID, Blob(), server.fetch)
        gate.wait_until_reached()
        os.unlink(cache.path_of(OID, TID, server.fetch))
        gate.open()
        with opening.result() as file:
            assert file.read() == server.data(OID, TID)
    assert len(server.fetched) == 2


def test_no_cleaner_removes_a_download_before_it_is_opened(cache, server, monkeypatch):
    gate = Gate()
    gate.shut()
    with monkeypatch.context() as patched:
        patched.setattr(blobs, "_opened", gate.before(blobs._opened))
        opening = Background(cache.open, OID, TID, None, server.fetch)
        gate.wait_until_reached()
        for _ in range(2):
            assert clean_completely(cache).removed == 0
        gate.open()
        with opening.result() as file:
            assert clean_completely(cache).remaining_bytes == 0
            assert file.read() == server.data(OID, TID)
    assert len(server.fetched) == 1


def clean_completely(cache):
    """A run of its own, as another process would do it."""
    return clean(cache._directory, Bound(0, 0, grace_s=0), lambda: False)


def test_blobs_are_read_right_while_a_cleaner_removes_them_all(directory):
    """Several readers, one of which has room for nothing."""
    server = Server()
    caches = [BlobCache(directory, 0, 0, grace_s=0), BlobCache(directory, 10**6)]

    def read_many(cache, seed):
        chosen = random.Random(seed)
        for _ in range(150):
            oid = p64(chosen.randrange(5))
            with cache.open(oid, TID, None, server.fetch) as file:
                assert file.read() == server.data(oid, TID)

    reading = [
        Background(read_many, cache, seed) for seed, cache in enumerate(caches + caches)
    ]
    done = threading.Event()

    def remove_all():
        while not done.is_set():
            clean_completely(caches[1])

    removing = Background(remove_all)
    for each in reading:
        each.result()
    done.set()
    removing.result()
    assert len(server.fetched) > 5, "nothing was removed in between"
    for cache in caches:
        cache.close()
    assert parts(directory) == []


READER = """
import random, sys
from zeolith.client.blobs import BlobCache
from ZODB.utils import p64
def fetch(oid, tid, file):
    file.write(oid * 500)
    file.write(oid * 500)
cache = BlobCache(sys.argv[1], 4000, 10, grace_s=0)
for _ in range(400):
    oid = p64(random.randrange(8))
    with cache.open(oid, p64(5), None, fetch) as file:
        assert file.read() == oid * 1000
print(cache.downloads)
"""


def test_processes_with_a_tiny_cache_read_right(directory):
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, directory], stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    downloads = [int(reader.communicate()[0]) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0]
    assert sum(downloads) > 8, "nothing was removed in between"


def test_a_path_that_was_given_stays_though_the_cache_is_full(directory, server):
    cache = BlobCache(directory, 100)
    path = cache.path_of(OID, TID, server.fetch)
    for number in range(20):
        cache.path_of(p64(number), TID, server.fetch)
    cleaner = cache.cleaner
    assert cleaner is not None
    wait_until(lambda: cleaner.last is not None, "a run of the cleaner")
    assert os.path.exists(path)
    cache.close()


def test_a_cache_without_a_bound_is_never_cleaned(cache, server):
    assert cache.cleaner is None
    cache.path_of(OID, TID, server.fetch)


# Blobs that are committed here.


def committed(cache, data=b"data"):
    path = os.path.join(cache.temporary_directory(), "BUC")
    with open(path, "wb") as file:
        file.write(data)
    os.utime(path, (0, 0))
    return path


def test_a_committed_file_becomes_the_cached_one(cache, server):
    path = committed(cache)
    number = os.stat(path).st_ino
    cache.adopt(OID, TID, path)
    cached = BlobDirectory(cache.directory).blob_path(OID, TID)
    assert os.stat(cached).st_ino == number
    assert os.stat(cached).st_mtime > 0, "it would be the first to go"
    assert mode(cached) == 0o400
    assert cache.path_of(OID, TID, server.fetch) == cached
    assert not os.path.exists(path)
    assert server.fetched == []


def test_a_file_is_taken_over_under_a_name_of_its_own(cache, tmp_path):
    (tmp_path / "mine").write_bytes(b"data")
    taken = cache.take(str(tmp_path / "mine"))
    assert os.path.dirname(taken) == cache.temporary_directory()
    assert read(taken) == b"data"
    assert not (tmp_path / "mine").exists()


def test_a_file_of_another_file_system_is_copied(cache, tmp_path, monkeypatch):
    def rename(path, target):
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "rename", rename)
    (tmp_path / "mine").write_bytes(b"data")
    assert read(cache.take(str(tmp_path / "mine"))) == b"data"
    assert not (tmp_path / "mine").exists()


def test_a_file_that_cannot_be_taken_over_stays(cache, tmp_path, monkeypatch):
    def fail(path, target):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr(shutil, "copyfile", fail)
    (tmp_path / "mine").write_bytes(b"data")
    with pytest.raises(OSError, match="full"):
        cache.take(str(tmp_path / "mine"))
    assert (tmp_path / "mine").exists()
    assert os.listdir(cache.temporary_directory()) == []


def test_after_a_commit_nothing_raises(cache, monkeypatch, caplog):
    cache.adopt(OID, TID, "/nowhere/at/all")
    assert "is not kept" in caplog.text

    def rename(path, target):
        raise OSError(errno.EIO, "broken")

    path = committed(cache)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        cache.adopt(OID, TID, path)
    assert not os.path.exists(path)


def test_what_is_committed_counts_as_added(directory):
    cache = BlobCache(directory, 100, grace_s=0)
    for number in range(20):
        cache.adopt(p64(number), TID, committed(cache, b"x" * 50))
    wait_until(lambda: used_bytes(cache) <= 100, "a run of the cleaner")
    cache.close()


def test_what_is_downloaded_counts_as_added(directory, server):
    cache = BlobCache(directory, 3 * server.size, grace_s=0)
    for number in range(20):
        cache.path_of(p64(number), TID, server.fetch)
    wait_until(lambda: used_bytes(cache) <= 3 * server.size, "a run of the cleaner")
    cache.close()


def used_bytes(cache):
    return sum(size for _mtime, size, _path in cache._directory.blobs())


# Forks.


def test_a_forked_child_uses_the_cache_in_the_middle_of_a_download(directory):
    """The parent is downloading, and dies; the child wants the same blob."""
    program = f"""
import os, threading
from zeolith.client.blobs import BlobCache
from ZODB.utils import p64
cache = BlobCache({directory!r}, 1000)
mine = cache.temporary_directory()
started = threading.Event()
def stall(oid, tid, file):
    file.write(b"half")
    started.set()
    threading.Event().wait()
arguments = (p64(1), p64(2), stall)
threading.Thread(target=cache.path_of, args=arguments, daemon=True).start()
started.wait()
child = os.fork()
if child:
    os._exit(0)
path = cache.path_of(p64(1), p64(2), lambda oid, tid, file: file.write(b"whole"))
assert cache.temporary_directory() != mine
print(open(path).read(), flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("whole\n", "")


# The server's own directory.


@pytest.fixture(params=["bushy", "lawn"])
def files(request, tmp_path):
    files = FilesystemHelper(str(tmp_path / "served"), request.param)
    files.create()
    return files


def serve(files, oid, tid, data=b"data"):
    path = files.getBlobFilename(oid, tid)
    files.getPathForOID(oid, create=True)
    with open(path, "wb") as file:
        file.write(data)
    return path


def test_a_shared_blob_is_where_the_server_has_it(files):
    shared = SharedBlobs(files.base_dir)
    path = serve(files, OID, TID)
    assert shared.path_of(OID, TID) == path
    with shared.open(OID, TID) as file:
        assert file.read() == b"data"
    blob = Blob()
    with shared.open(OID, TID, blob) as file:
        assert file.blob is blob


def test_a_shared_blob_that_is_not_there_is_a_key_error(files):
    shared = SharedBlobs(files.base_dir)
    serve(files, OID, TID)
    for oid, tid in ((OID, p64(6)), (p64(7), TID)):
        with pytest.raises(POSKeyError):
            shared.path_of(oid, tid)
        with pytest.raises(POSKeyError):
            shared.open(oid, tid)


def test_a_shared_blob_that_a_pack_removes_meanwhile_is_a_key_error(files, monkeypatch):
    shared = SharedBlobs(files.base_dir)
    serve(files, OID, TID)
    opened = blobs._opened

    def packed_before(path, blob):
        os.unlink(path)
        return opened(path, blob)

    monkeypatch.setattr(blobs, "_opened", packed_before)
    with pytest.raises(POSKeyError):
        shared.open(OID, TID)


def test_a_file_for_the_server_is_put_where_it_takes_it(files, tmp_path):
    shared = SharedBlobs(files.base_dir)
    assert shared.temporary_directory() == os.path.join(files.base_dir, "tmp")
    (tmp_path / "mine").write_bytes(b"data")
    taken = shared.take(str(tmp_path / "mine"))
    assert os.path.dirname(taken) == shared.temporary_directory()
    assert not mode(taken) & 0o222
    shared.adopt(OID, TID, taken)
    assert not os.path.exists(taken)
    shared.adopt(OID, TID, taken)
    shared.close()


def test_a_shared_directory_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        SharedBlobs(tmp_path / "unmounted")
    assert not (tmp_path / "unmounted").exists()


@pytest.mark.parametrize("layout", ["zeocache", "unheard-of"])
def test_a_shared_directory_of_another_kind_is_refused(tmp_path, layout):
    (tmp_path / ".layout").write_text(layout)
    with pytest.raises(ValueError, match=layout):
        SharedBlobs(tmp_path)


def test_a_blob_cache_is_no_shared_directory(cache, directory):
    with pytest.raises(ValueError, match="not the blob directory of a server"):
        SharedBlobs(directory)


def test_a_locked_part_is_left_to_its_downloader(cache, directory):
    path = BlobDirectory(directory).part_path(OID, TID)
    fd = open_lockable(path, os.O_RDWR | os.O_CREAT)
    assert try_lock(fd)
    BlobCache(directory)
    assert os.path.exists(path)
    release(fd)
