"""A runner without a model: speaks the protocol as the real ones do. `--kv` says what is to go wrong."""

import sys
import time
from argparse import Namespace
from typing import Any

from benchmarks.peers.protocol import Prompts, serve

ROW = 100  # bytes of a token


class Fake:
    def __init__(self, options: Namespace) -> None:
        if options.kv == "unloadable":
            raise ValueError("no such\n cache")
        if options.kv == "crash":
            sys.exit("out of luck")
        self.kv = options.kv
        self.tokens = self.sequences = 0

    def about(self) -> dict[str, Any]:
        print("a library talks to stdout")
        return {"peer": "fake", "version": "1", "weights": "bf16", "kv": self.kv, "weight_bytes": 1000}

    def read(self, prompts: Prompts) -> None:
        assert not self.tokens
        self.tokens, self.sequences = sum(map(len, prompts)), len(prompts)

    def step(self) -> None:
        if self.kv == "fragile":
            raise RuntimeError("cannot step")
        time.sleep(0.2 if self.kv == "slow" else 0.001)
        self.tokens += self.sequences

    def held(self) -> tuple[int, int]:
        return self.tokens, ROW * self.tokens

    def drop(self) -> None:
        self.tokens = self.sequences = 0


if __name__ == "__main__":
    serve(Fake)
