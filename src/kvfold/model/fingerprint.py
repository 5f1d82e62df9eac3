"""A short identity of a model, so that an artifact made for one is refused by another."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kvfold.errors import ModelError
from kvfold.model.checkpoint import shard_paths
from kvfold.model.hf_config import read_json

_BLOCK = 4096
_BLOCKS_PER_TENSOR = 8
# Entries that differ between copies of one model, depending on who saved it with what.
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"})


def fingerprint(directory: Path) -> str:
    """Hex SHA-256 over config.json and the weights in `directory`; milliseconds, whatever the size.

    Of each tensor it covers the name, dtype, shape and up to 8 blocks of 4 KiB spread evenly from its
    first to its last byte, in name order: how a model is sharded does not matter, a fine-tuned, merged
    or otherwise converted copy gets another fingerprint. A change confined to the bytes between the
    blocks is not seen. Raises ModelError if a file is missing or corrupt.
    """
    config = {k: v for k, v in read_json(directory / "config.json").items() if k not in _VOLATILE}
    digest = hashlib.sha256(_canonical(config))
    for _, identity in sorted(entry for path in shard_paths(directory) for entry in _tensors(path)):
        digest.update(identity)
    return digest.hexdigest()


def file_key(path: Path) -> str:
    """Hex SHA-256 over a file's size and blocks spread evenly over its content, first and last included."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        # The start of a GGUF file is its metadata: all of it counts.
        digest.update(file.read(1 << 20))
        for block in _blocks(file, 0, size, count=256):
            digest.update(block)
    return digest.hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, digest) of each tensor in a safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(_canonical([name, entry["dtype"], entry["shape"]]))
                for block in _blocks(file, 8 + length + begin, 8 + length + end, _BLOCKS_PER_TENSOR):
                    digest.update(block)
                yield name, digest.digest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is truncated or not a safetensors file: download it again") from error


def _blocks(file: BinaryIO, begin: int, end: int, count: int) -> Iterator[bytes]:
    """Up to `count` blocks of the bytes [begin, end): all bytes if these are few, else evenly spread."""
    if end - begin <= count * _BLOCK:
        file.seek(begin)
        yield file.read(end - begin)
        return
    for index in range(count):
        file.seek(begin + (end - begin - _BLOCK) * index // (count - 1))
        yield file.read(_BLOCK)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
