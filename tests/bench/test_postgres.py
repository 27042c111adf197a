"""RelStorage's server: what it needs, and that it serves what the others serve."""

import pytest
from ZODB.utils import maxtid

from . import compare, postgres, servers
from .rows import trials
from .test_rows import SMALLEST


def test_without_the_programs_it_says_which_are_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert postgres.missing() == "PostgreSQL's initdb and postgres in PATH"


def test_a_folder_too_deep_for_a_socket_is_refused_before_anything_is_made(tmp_path):
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()

    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(postgres.CannotRun, match="too long"),
    ):
        postgres.make_cluster(folder, None, log)

    assert list(folder.iterdir()) == []


def test_a_peer_that_cannot_run_is_named_and_left_out(monkeypatch, capsys):
    def refuse(*_arguments, **_options):
        raise postgres.CannotRun("no place")

    monkeypatch.setattr(servers, "running", refuse)
    arguments = [
        "compare",
        "--quick",
        "--rounds=1",
        "--rows=gil",
        "--peers=filestorage",
    ]
    monkeypatch.setattr("sys.argv", arguments)

    assert compare.main() == 0
    assert "filestorage is left out, it does not run here: no place" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.skipif(
    bool(servers.missing("relstorage")), reason="no PostgreSQL or no RelStorage here"
)
def test_relstorage_serves_the_same_data():
    (trial,) = [each for each in trials(SMALLEST) if each.rows[0].key == "loads-16p"]
    with compare.standing(None) as stand, stand.fresh("relstorage") as running:
        storage = running.endpoint.open()
        data, tid, _end = storage.loadBefore(b"\0" * 8, maxtid)
        storage.close()
        rate, cpu_us = trial.run(running, SMALLEST)

        with stand.fresh("filestorage") as plain:
            file = plain.endpoint.open()
            assert file.loadBefore(b"\0" * 8, maxtid) == (data, tid, None)
            file.close()

    assert rate > 0
    assert cpu_us > 0
