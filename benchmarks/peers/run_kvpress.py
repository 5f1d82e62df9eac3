"""kvpress: transformers, with a press that drops tokens when the prompt has been read. `--kv` is `snapkv(0.5)`: the
share that goes."""

import argparse
import re
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import kvpress

from benchmarks.peers.protocol import serve
from benchmarks.peers.run_transformers import Transformers

PRESSES = {"snapkv": kvpress.SnapKVPress, "knorm": kvpress.KnormPress, "expected": kvpress.ExpectedAttentionPress}


class KVPress(Transformers):
    def __init__(self, options: argparse.Namespace) -> None:
        found = re.fullmatch(r"(\w+)\(([\d.]+)\)", options.kv)
        if found is None or found[1] not in PRESSES:
            raise ValueError(
                f"--kv {options.kv}: give one of {', '.join(PRESSES)} with the share that goes: snapkv(0.5)"
            )
        self.press = PRESSES[found[1]](compression_ratio=float(found[2]))
        super().__init__(options)

    def about(self) -> dict[str, Any]:
        named = {"version": version("kvpress"), "kv": f"{self.options.weights}, {self.options.kv}"}
        return {**super().about(), "peer": "kvpress", **named}

    def reading(self) -> AbstractContextManager[Any]:
        return self.press(self.model)


if __name__ == "__main__":
    serve(KVPress)
