import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvfold.calibration.artifact import FORMAT_VERSION, Artifact, Header, load_artifact, save_artifact
from kvfold.errors import CalibrationError

HEADER = Header("model-hash", "text-hash", 0.0, 0.5, 2048, 512, 1.25, 17.5)
TENSORS = {"a": torch.randn(2, 3), "held_out": torch.arange(10).view(2, 5), "steps": torch.rand(4).double()}
ARTIFACT = Artifact(HEADER, TENSORS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "er" / "x.kvfold.safetensors"


def test_what_was_saved_is_read_back(path: Path) -> None:
    save_artifact(path, ARTIFACT)
    for model in (None, HEADER.model):
        read = load_artifact(path, model)
        assert read.header == HEADER
        assert read.tensors.keys() == TENSORS.keys()
        assert all(torch.equal(read.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_later_file_replaces_an_earlier_one(path: Path) -> None:
    save_artifact(path, ARTIFACT)
    save_artifact(path, Artifact(HEADER, {"b": torch.zeros(1)}))
    assert list(load_artifact(path).tensors) == ["b"]


def test_tensors_of_any_strides_are_saved(path: Path) -> None:
    turned = torch.arange(6).view(2, 3).T
    save_artifact(path, Artifact(HEADER, {"turned": turned.contiguous()}))
    assert torch.equal(load_artifact(path).tensors["turned"], turned)


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    save_artifact(path, ARTIFACT)
    data = path.read_bytes()
    for byte in range(len(data)):
        for bit in (byte % 8, (5 * byte + 3) % 8):
            damaged = bytearray(data)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CalibrationError, match="kvfold calibrate"):
                load_artifact(path)


def test_every_truncated_file_is_noticed(path: Path) -> None:
    save_artifact(path, ARTIFACT)
    data = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CalibrationError, match="damaged"):
            load_artifact(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CalibrationError, match="damaged"):
        load_artifact(path)


def test_files_of_other_kinds_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration"):
        load_artifact(path)
    with pytest.raises(CalibrationError, match="there is no calibration"):
        load_artifact(tmp_path)
    other = tmp_path / "other.safetensors"
    save_file(TENSORS, other)
    with pytest.raises(CalibrationError, match="not a kvfold calibration"):
        load_artifact(other)
    save_file(TENSORS, other, {"kvfold_format": str(FORMAT_VERSION + 1)})
    with pytest.raises(CalibrationError, match=f"format {FORMAT_VERSION + 1}"):
        load_artifact(other)
    for header in ("[1", "{}", "3", json.dumps({"model": "m", "colour": 1})):
        save_file(TENSORS, other, {"kvfold_format": str(FORMAT_VERSION), "kvfold_header": header})
        with pytest.raises(CalibrationError, match="damaged"):
            load_artifact(other)


def test_an_artifact_of_another_model_is_refused(path: Path) -> None:
    save_artifact(path, ARTIFACT)
    with pytest.raises(CalibrationError, match="another model"):
        load_artifact(path, "some other hash")


def fail_with(code: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("where", "name"),
    [(os, "fsync"), (Path, "open"), (Path, "replace"), (Path, "mkdir")],
    ids=["write", "create", "rename", "folder"],
)
def test_a_full_disk_leaves_the_older_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: object, name: str
) -> None:
    save_artifact(path, ARTIFACT)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail_with(errno.ENOSPC))
        with pytest.raises(CalibrationError, match="No space left on device; free some space"):
            save_artifact(path, Artifact(HEADER, {"b": torch.zeros(1)}))
    assert load_artifact(path).tensors.keys() == TENSORS.keys()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interruption_leaves_no_temporary_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(path, ARTIFACT)
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot write"):
        save_artifact(tmp_path / "file" / "x.kvfold.safetensors", ARTIFACT)
