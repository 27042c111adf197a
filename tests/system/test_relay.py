"""A relay as an operator starts, watches and stops it."""

import json
from pathlib import Path

import pytest

from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage

from ..support.commanding import complaint, written, zeolith
from ..support.records import commit, seen
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

# The port of a service that no machine has any more.
NOBODY = ("127.0.0.1", 9)


def configuration(address: tuple[str, int], more: str = "") -> str:
    host, port = address
    return (
        "%import zeolith.client.upstream\n"
        f"<upstream main>\nserver {host}:{port}\nwait-timeout 0.5\n{more}\n"
        "</upstream>\n"
    )


@pytest.mark.parametrize("more", ["", "wait off"])
def test_a_relay_that_finds_no_server_says_so_in_a_line(tmp_path: Path, more: str):
    server = "<zeolith>\naddress 127.0.0.1:0\n</zeolith>\n"
    # Nobody listens on the port of echo's discard.
    conf = written(
        tmp_path / "server.conf", server + configuration(("127.0.0.1", 9), more)
    )
    done = zeolith("serve", "-C", str(conf))
    assert done.returncode == 1
    line = complaint(done)
    assert line.startswith("storage main: 127.0.0.1:9: no connection within 0.5 s")
    assert line.endswith("Connection refused")


def test_the_configuration_of_a_relay_is_checked_without_a_server(tmp_path: Path):
    conf = written(tmp_path / "server.conf", configuration(NOBODY))
    done = zeolith("check-config", "-C", str(conf))
    assert done.returncode == 0, done.stderr
    assert "main" in done.stdout


def test_a_relay_is_watched_and_stopped_while_its_server_is_away(tmp_path: Path):
    folder = tmp_path / "relay"
    folder.mkdir()
    with ServerProcess(tmp_path) as server:
        relay = ServerProcess(folder, storages=configuration(server.address))
        with relay:
            client = ClientStorage(relay.address, storage="main")
            commit(client, x=b"1")
            server.kill()

            def is_away() -> bool:
                try:
                    client.getTid(b"nothing!")
                except ClientDisconnected:
                    return True
                except KeyError:
                    return False
                raise AssertionError("it is not there")

            wait_until(is_away, "the loss of the server")
            assert seen(client, "x") == b"1"
            host, port = relay.address
            shown = zeolith("status", "--json", f"{host}:{port}")
            assert shown.returncode == 0, shown.stderr
            storage = json.loads(shown.stdout)["storages"]["main"]
            assert (storage["objects"], storage["broken"]) == (0, None)
            client.close()
            relay.terminate()
            assert "given up" not in relay.stderr_text()
            assert "Traceback" not in relay.stderr_text()
