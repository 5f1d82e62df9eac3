"""The fingerprint tells models apart, and only models."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvfold.errors import ModelError
from kvfold.model.fingerprint import file_key, fingerprint


def test_every_tensor_counts(tiny_llama: Any) -> None:
    directory = tiny_llama[0]
    path = directory / "model.safetensors"
    original = load_file(path)
    seen = {fingerprint(directory)}
    for name in original:
        changed = {key: tensor.clone() for key, tensor in original.items()}
        changed[name].view(-1)[-1] += 1
        save_file(changed, path)
        seen.add(fingerprint(directory))
    assert len(seen) == len(original) + 1
    save_file(dict(reversed(original.items())), path, metadata={"saved": "again"})
    assert fingerprint(directory) in seen


def test_config_counts_but_not_who_saved_it(tiny_llama: Any) -> None:
    directory = tiny_llama[0]
    before = fingerprint(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_version": "9.9", "use_cache": False}, indent=1))
    assert fingerprint(directory) == before
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert fingerprint(directory) != before


@given(content=st.binary(max_size=200))
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path_factory: Any) -> None:
    directory = tmp_path_factory.mktemp("corrupt")
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        fingerprint(directory)


def test_file_key_covers_length_start_and_end(tmp_path: Path) -> None:
    content = bytearray(3 << 20)
    keys = set()
    for edit in (None, 0, 5000, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        if edit is not None:
            changed[edit] ^= 1
        (tmp_path / "file").write_bytes(changed)
        keys.add(file_key(tmp_path / "file"))
    (tmp_path / "file").write_bytes(content[:-1])
    keys.add(file_key(tmp_path / "file"))
    assert len(keys) >= 5
