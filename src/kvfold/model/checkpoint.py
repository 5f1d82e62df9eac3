"""Reading the safetensors files of a model directory, one tensor at a time."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvfold.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Buffers that some writers store although they are no weights.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in name order.

    Raises ModelError if there are none, if the index is unreadable, or if a shard is missing.
    """
    index = directory / _INDEX
    if not index.is_file():
        if (directory / _SINGLE).is_file():
            return [directory / _SINGLE]
        raise ModelError(
            f"no {_SINGLE} or {_INDEX} in {directory}: save the model there as safetensors "
            "(save_pretrained of transformers does)"
        )
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        paths = [directory / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a safetensors index ({error}): download it again") from error
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(paths)} weight files are missing from {directory}, "
            f"the first is {missing[0]}: download them again"
        )
    return paths


class Checkpoint:
    """Named tensors of a model directory. Tensors are memory-mapped until they are copied out."""

    def __init__(self, directory: Path) -> None:
        """Open every shard; raises ModelError for missing, truncated or corrupt ones."""
        self.directory = directory
        # Any: safe_open has no type annotations.
        self._file_of: dict[str, Any] = {}
        for path in shard_paths(directory):
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} is truncated or not a safetensors file ({error}): download it again"
                ) from error
            for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                self._file_of[name] = file
        self._unread = set(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The stored tensor `name`; raises ModelError if it is missing, of another shape or quantised."""
        if name not in self._file_of:
            raise ModelError(
                f"weight {name} is missing from {self.directory}: "
                "its weights do not fit its config.json, or the download is incomplete"
            )
        stored = tuple(self._file_of[name].get_slice(name).get_shape())
        if stored != shape:
            raise ModelError(
                f"weight {name} in {self.directory} has shape {list(stored)} where config.json asks for "
                f"{list(shape)}: use the config.json that belongs to these weights"
            )
        tensor: Tensor = self._file_of[name].get_tensor(name)
        if tensor.dtype not in _FLOATS:
            raise ModelError(
                f"weight {name} in {self.directory} is stored as {tensor.dtype}: quantised weights are not "
                "supported, use the bfloat16, float16 or float32 version of the model"
            )
        self._unread.discard(name)
        return tensor

    def check_all_read(self, prefix: str) -> None:
        """Raise ModelError if weights below `prefix` were never read: running without them would be wrong."""
        unread = sorted(self._weights(name for name in self._unread if name.startswith(prefix)))
        if unread:
            raise ModelError(
                f"{self.directory} has {len(unread)} weights that its config.json does not account for, "
                f"the first is {unread[0]}: this variant of the model is not supported"
            )

    @staticmethod
    def _weights(names: Iterable[str]) -> Iterable[str]:
        return (name for name in names if not _BUFFERS.search("." + name))
