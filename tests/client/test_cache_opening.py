"""Which cache a storage has."""

import os

import pytest

from zeolith.client import cache_place
from zeolith.client.cache import MemoryCache
from zeolith.client.cache_opening import directory_of, open_cache

MB = 1024**2


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [
        ((None, None, None), None),
        ((None, None, "/var"), None),
        (("cache", "web", "/var"), "cache"),
        ((None, "web", "/var"), "/var/web-main.cache"),
        ((None, "web", None), os.path.join(os.getcwd(), "web-main.cache")),
    ],
)
def test_the_names_of_a_zeo_configuration_are_those_of_a_directory(
    arguments: tuple[str | None, str | None, str | None], directory: str | None
) -> None:
    assert directory_of(*arguments, "main") == directory


def test_where_no_file_can_be_each_process_caches_for_itself(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = open_cache(str(tmp_path / "file" / "cache"), "1", MB, lambda tid: None)
    assert isinstance(cache, MemoryCache)
    assert "not used" in caplog.text


def test_without_a_directory_it_is_in_memory(tmp_path):
    assert isinstance(open_cache(None, "1", MB, lambda tid: None), MemoryCache)


def test_a_network_file_system_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_place, "file_system_of", lambda path: "nfs")
    with pytest.raises(ValueError, match="network file system"):
        open_cache(str(tmp_path), "1", MB, lambda tid: None)
