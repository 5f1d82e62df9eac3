"""Entries of the cache appear whole or not at all."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvfold.errors import ModelError
from kvfold.model.cache import cache_folder, cached_directory, check_space


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(directory: Path) -> None:
    (directory / "file").write_text("whole")


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix != ".lock"]


def test_default_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("KVFOLD_CACHE")
    assert cache_folder().name == "kvfold"


def test_built_once(cache: Path) -> None:
    assert cached_directory("a/b", write) == cache / "a" / "b"

    def never(directory: Path) -> None:
        raise AssertionError

    assert (cached_directory("a/b", never) / "file").read_text() == "whole"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ModelError, RuntimeError])
def test_interruption_leaves_nothing(interruption: type[BaseException], cache: Path) -> None:
    def interrupted(directory: Path) -> None:
        write(directory)
        raise interruption

    with pytest.raises(interruption):
        cached_directory("a", interrupted)
    assert visible(cache) == []
    assert cached_directory("a", write).is_dir()


def test_leftovers_of_a_killed_process_are_replaced(cache: Path) -> None:
    leftover = cache / ".a.partial"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    assert [path.name for path in cached_directory("a", write).iterdir()] == ["file"]
    assert not leftover.exists()


def test_of_many_one_builds(cache: Path) -> None:
    builds = []
    ready = threading.Barrier(4)

    def build(directory: Path) -> None:
        builds.append(directory)
        write(directory)

    def attempt(_: int) -> Path:
        ready.wait()
        return cached_directory("a", build)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(attempt, range(4))) == {cache / "a"}
    assert len(builds) == 1


def test_full_disk_names_the_remedy(cache: Path) -> None:
    with pytest.raises(ModelError, match="KVFOLD_CACHE"):
        cached_directory("a", lambda directory: check_space(directory, 1 << 60))
    assert visible(cache) == []


def test_unwritable_cache_names_the_remedy(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="KVFOLD_CACHE"):
        cached_directory("a", write)


def test_a_folder_that_cannot_be_looked_up_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", "x" * 5000)
    with pytest.raises(ModelError, match="set KVFOLD_CACHE"):
        cached_directory("entry", write)
