"""A file is written whole, or stays as it was."""

import os
from pathlib import Path

import pytest

from kvfold.config.files import write_atomically


def full_disk(_: int) -> None:
    raise OSError(28, "No space left on device")


def interrupted(_: int) -> None:
    raise KeyboardInterrupt


def test_a_file_is_replaced(tmp_path: Path) -> None:
    for data in (b"before", b"after"):
        write_atomically(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("failure", "error"), [(full_disk, OSError), (interrupted, KeyboardInterrupt)])
@pytest.mark.parametrize("before", [None, b"before"])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None, failure: object, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(os, "fsync", failure)
    with pytest.raises(error):
        write_atomically(path, b"after")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == ({} if before is None else {"file": before})


def test_a_folder_in_the_way_stays_and_has_no_new_neighbour(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", b"")
    with pytest.raises(OSError, match="missing"):
        write_atomically(tmp_path / "missing" / "file", b"")
    assert os.listdir(tmp_path) == ["folder"]
