"""transformers: a loop of forward passes over its default cache, greedy. Leaner than `generate()`, same operators."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers.protocol import Prompts, serve

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Transformers:
    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.weights]).eval()
        self.options = options
        self.drop()

    def about(self) -> dict[str, Any]:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        named = {"weights": self.options.weights, "kv": self.options.weights, "weight_bytes": weights}
        return {"peer": "transformers", "version": transformers.__version__, **named}

    def reading(self) -> AbstractContextManager[Any]:
        """What prompts are read under."""
        return nullcontext()

    @torch.inference_mode()
    def read(self, prompts: Prompts) -> None:
        self.cache = DynamicCache(config=self.model.config)
        with self.reading():
            self._forward(torch.tensor(prompts))

    @torch.inference_mode()
    def step(self) -> None:
        self._forward(self.last)

    def _forward(self, ids: torch.Tensor) -> None:
        positions = torch.arange(self.length, self.length + ids.shape[1])[None]
        logits = self.model(ids, position_ids=positions, past_key_values=self.cache, logits_to_keep=1).logits
        self.length += ids.shape[1]
        self.last = logits[:, -1:].argmax(-1)

    def held(self) -> tuple[int, int]:
        rows = [rows for layer in self.cache.layers for rows in (layer.keys, layer.values) if rows is not None]
        tokens = self.length * len(self.last) if rows else 0
        return tokens, sum(each.numel() * each.element_size() for each in rows)

    def drop(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.length, self.last = 0, torch.empty(0, 1, dtype=torch.long)


if __name__ == "__main__":
    serve(Transformers)
