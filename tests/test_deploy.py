"""Every file of deploy/ is used, as far as a machine without systemd and Docker can.

A file is taken as it is; only its addresses and folders are replaced by those of
the test.
"""

import configparser
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

import pytest
import ZConfig
from ZODB.config import databaseFromString
from ZODB.DB import DB
from zodburi import resolve_uri

from .support.serving import ServerProcess

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
ZEOLITH = str(Path(sys.executable).with_name("zeolith"))
WAIT_S = 30


@contextmanager
def running(command: list[str], **options) -> Iterator[subprocess.Popen[str]]:
    """The process that a command line starts; it must stop with 0 when asked to."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def addresses_of(process: subprocess.Popen[str]) -> list[str]:
    """What the server printed until it said that it is ready."""
    assert process.stdout is not None
    found: list[str] = []
    for line in process.stdout:
        if line == "ready\n":
            return found
        found.append(line.strip().removeprefix("listening on "))
    raise AssertionError(f"the server stopped: {process.wait(WAIT_S)}")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def server_conf(tmp_path) -> Path:
    text = (DEPLOY / "server.conf").read_text()
    for given, ours in {
        "127.0.0.1:8100": "127.0.0.1:0",
        "/run/zeolith": str(tmp_path),
        "/var/lib/zeolith": str(tmp_path),
    }.items():
        assert given in text
        text = text.replace(given, ours)
    path = tmp_path / "server.conf"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    """The settings of the unit's [Service], each of which may stand there twice."""
    settings: dict[str, list[str]] = {}
    section = (DEPLOY / "zeolith.service").read_text().split("[Service]")[1]
    for line in section.split("[Install]")[0].splitlines():
        if line and not line.startswith("#"):
            name, value = line.split("=", 1)
            settings.setdefault(name, []).append(value)
    return settings


def on_this_machine(command: str, server_conf: Path) -> list[str]:
    program, *arguments = shlex.split(command)
    assert program == "/opt/zeolith/bin/zeolith"
    assert "/etc/zeolith/server.conf" in arguments
    given = {"/etc/zeolith/server.conf": str(server_conf)}
    return [ZEOLITH, *(given.get(word, word) for word in arguments)]


def states_sent(notified: socket.socket) -> list[str]:
    return notified.recv(4096).decode().splitlines()


def test_the_units_command_lines_start_reload_and_stop(unit, server_conf, tmp_path):
    (start,) = unit["ExecStart"]
    check, reload = unit["ExecReload"]
    run(*on_this_machine(check, server_conf))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(WAIT_S)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = on_this_machine(start, server_conf)
        with running(command, env=environment, cwd=tmp_path) as process:
            while "READY=1" not in states_sent(notified):
                pass
            tcp, unix = addresses_of(process)
            run(*shlex.split(reload.replace("$MAINPID", str(process.pid))))
            for address in (tcp, unix):
                run(ZEOLITH, "ping", address)
    assert (tmp_path / "Data.fs").exists()


def test_the_unit_gives_the_server_more_time_to_stop_than_it_takes(unit):
    """Otherwise systemd kills a server that is saving its index."""
    text = (DEPLOY / "server.conf").read_text()
    (timeout,) = (
        line.split()[1]
        for line in text.splitlines()
        if line.strip().startswith("shutdown-timeout")
    )
    assert int(unit["TimeoutStopSec"][0].rstrip("s")) > 2 * int(timeout.rstrip("s"))


def test_the_unit_lets_the_server_write_where_its_configuration_says(unit):
    text = (DEPLOY / "server.conf").read_text()
    assert f"/var/lib/{unit['StateDirectory'][0]}/Data.fs" in text
    assert f"/run/{unit['RuntimeDirectory'][0]}/" in text


def test_the_servers_group_may_use_the_socket_and_nobody_else(
    unit, server_conf, tmp_path
):
    command = on_this_machine(unit["ExecStart"][0], server_conf)
    umask = int(unit["UMask"][0], 8)
    with running(command, cwd=tmp_path, umask=umask) as process:
        _tcp, path = addresses_of(process)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        # The data is nobody's but the server's.
        assert stat.S_IMODE(os.stat(tmp_path / "Data.fs").st_mode) == 0o600
    assert unit["StateDirectoryMode"] == ["0700"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    text = (DEPLOY / "zeolith.service").read_text()
    path = tmp_path / "zeolith.service"
    path.write_text(text.replace("/opt/zeolith/bin/zeolith", ZEOLITH))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_that_packs_packs(server):
    text = (DEPLOY / "zeolith-pack.service").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
    program, *arguments = shlex.split(line.removeprefix("ExecStart="))
    assert program == "/opt/zeolith/bin/zeolith"
    assert arguments[:2] == ["pack", "127.0.0.1:8100"]
    host, port = server.address
    told = run(ZEOLITH, "pack", f"{host}:{port}", *arguments[2:])
    assert told.splitlines()[-1] == "there is nothing to pack"


def test_the_timer_is_that_of_the_unit_that_packs():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(DEPLOY / "zeolith-pack.timer")
    assert "OnCalendar" in parser["Timer"]
    assert parser["Install"]["WantedBy"] == "timers.target"
    # A timer starts the service of its own name.
    assert (DEPLOY / "zeolith-pack.service").exists()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_the_timer(tmp_path):
    for name in ("zeolith-pack.service", "zeolith-pack.timer", "zeolith.service"):
        text = (DEPLOY / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/zeolith/bin/zeolith", ZEOLITH))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "zeolith-pack.timer"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def dockerfile() -> list[Instruction]:
    """Its instructions with their arguments, continuation lines joined."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    split = [line.split(None, 1) for line in lines]
    return [(name, " ".join(arguments.split())) for name, arguments in split]


def only(dockerfile: list[Instruction], name: str) -> str:
    (found,) = (given for instruction, given in dockerfile if instruction == name)
    return found


def copied_from_the_tree(dockerfile: list[Instruction]) -> set[str]:
    copies = [given.split() for name, given in dockerfile if name == "COPY"]
    return {
        source
        for words in copies
        if not words[0].startswith("--from")
        for source in words[:-1]
    }


def test_the_image_is_made_of_files_that_exist(dockerfile):
    sources = copied_from_the_tree(dockerfile)
    assert {"client", "protocol", "server", "storage", "pyproject.toml"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source


def test_the_image_is_not_kept_from_what_it_is_made_of(dockerfile):
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert let_through == copied_from_the_tree(dockerfile)


def test_the_image_builds_a_wheel_of_what_it_copies(dockerfile, tmp_path):
    for source in copied_from_the_tree(dockerfile):
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    run_lines = [given for name, given in dockerfile if name == "RUN"]
    (line,) = (given for given in run_lines if given.startswith("pip wheel"))
    # Everything but the isolation, so that no test asks the network for anything.
    words = shlex.split(line.replace("/dist", str(tmp_path / "dist")))
    build = [sys.executable, "-m", *words, "--no-build-isolation", "--quiet"]
    subprocess.run(build, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.startswith("zeolith-")
    assert any("/dist/zeolith-*.whl" in given for given in run_lines)


def test_the_image_runs_as_nobody_special(dockerfile):
    user = only(dockerfile, "USER").split(":")[0]
    assert user.isdecimal()
    assert user != "0"


def test_the_images_command_serves_and_is_healthy(dockerfile, tmp_path):
    program, *options = json.loads(only(dockerfile, "ENTRYPOINT"))
    command = [*options, *json.loads(only(dockerfile, "CMD"))]
    assert program == "zeolith"
    assert only(dockerfile, "EXPOSE") == "8100"
    volume = only(dockerfile, "VOLUME")
    given = {
        "0.0.0.0:8100": "127.0.0.1:0",
        f"{volume}/Data.fs": str(tmp_path / "Data.fs"),
    }
    assert set(given) <= set(command)
    words = [given.get(word, word) for word in command]
    with running([ZEOLITH, *words], cwd=tmp_path) as process:
        (address,) = addresses_of(process)
        check = json.loads(only(dockerfile, "HEALTHCHECK").split("CMD ")[1])
        assert check == ["zeolith", "ping", "127.0.0.1:8100"]
        run(ZEOLITH, "ping", address)
    assert (tmp_path / "Data.fs").exists()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("served")) as started:
        yield started


def connected_to(server: ServerProcess, name: str) -> str:
    """A client's file with the address of the server of this test."""
    text = (DEPLOY / "clients" / name).read_text()
    assert "127.0.0.1:8100" in text
    host, port = server.address
    return text.replace("127.0.0.1:8100", f"{host}:{port}")


def use(db: DB, server: ServerProcess, label: str) -> None:
    """Commit something, and be known to the server by the label."""
    try:
        with db.transaction() as connection:
            connection.root()[label] = "written"
        with db.transaction() as connection:
            assert connection.root()[label] == "written"
        host, port = server.address
        assert label in run(ZEOLITH, "status", f"{host}:{port}")
    finally:
        db.close()


def test_a_zodb_configuration_connects(server):
    db = databaseFromString(connected_to(server, "zodb.conf"))
    assert db.database_name == "main"
    use(db, server, "worker")


# What Zope's own schema says of <zodb_db>.
ZOPE_SCHEMA = """
<schema>
  <import package="ZODB"/>
  <sectiontype name="zodb_db" datatype="ZODB.config.ZODBDatabase"
               implements="ZODB.database" extends="zodb">
    <multikey name="mount-point" required="yes" attribute="mount_points"/>
  </sectiontype>
  <multisection type="zodb_db" name="+" attribute="databases"/>
</schema>
"""


def test_a_zope_configuration_connects(server):
    schema = ZConfig.loadSchemaFile(StringIO(ZOPE_SCHEMA))
    text = StringIO(connected_to(server, "zope.conf"))
    config, _handlers = ZConfig.loadConfigFile(schema, text)
    (section,) = config.databases
    assert section.config.mount_points == ["/"]
    use(section.open(), server, "zope")


def test_a_pyramid_configuration_connects(server):
    parser = configparser.ConfigParser()
    parser.read_string(connected_to(server, "pyramid.ini"))
    factory, options = resolve_uri(parser["app:main"]["zodbconn.uri"])
    db = DB(factory(), **options)
    assert db.getPoolSize() == 7
    use(db, server, "pyramid")


def test_a_plain_program_counts_on(server, tmp_path):
    program = tmp_path / "client.py"
    program.write_text(connected_to(server, "client.py"))
    assert [run(sys.executable, str(program)) for _ in range(3)] == [
        "1\n",
        "2\n",
        "3\n",
    ]


def test_a_plain_program_takes_an_address(server):
    host, port = server.address
    program = str(DEPLOY / "clients" / "client.py")
    assert int(run(sys.executable, program, f"{host}:{port}")) > 0
