"""kvfold: its engine, step by step, without prefix caching. `--kv` is a method."""

import argparse
from typing import Any

import torch

import kvfold
from benchmarks.peers.protocol import Prompts, serve
from kvfold import LLM, SamplingParams

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
DENSE_TOKEN = 23_040
"""Bytes of a token in a dense 16-bit cache of SmolLM2-135M."""


class KVFold:
    def __init__(self, options: argparse.Namespace) -> None:
        room = options.context + 512  # whole pages, and a chunk on its way
        self.llm = LLM(
            options.model,
            kv=options.kv,
            kv_memory=options.batch * room * DENSE_TOKEN,
            dtype=DTYPES[options.weights],
            max_sequences=options.batch,
            prefix_caching=False,
            threads=options.threads,
        )
        self.engine = self.llm.engine
        self.options = options

    def about(self) -> dict[str, Any]:
        decoder = self.llm.model.decoder
        kv = "bf16" if self.options.kv == "none" else self.options.kv
        weights = sum(p.numel() * p.element_size() for p in tensors(decoder.weights))
        named = {"weights": NAMES[decoder.dtype], "kv": kv, "weight_bytes": weights}
        return {"peer": "kvfold", "version": kvfold.__version__, **named}

    def read(self, prompts: Prompts) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=self.options.context, ignore_eos=True)
        self.ids = [self.engine.add_request(prompt, params) for prompt in prompts]
        started: set[str] = set()
        while len(started) < len(prompts):
            started |= {output.request_id for output in self.engine.step()}

    def step(self) -> None:
        given = len(self.engine.step())
        if given != len(self.ids):
            raise RuntimeError(f"a step gave tokens to {given} of {len(self.ids)} sequences: too little KV memory")

    def held(self) -> tuple[int, int]:
        running = self.engine.scheduler.running
        return sum(s.computed for s in running), sum(s.held.nbytes for s in running)

    def drop(self) -> None:
        for request in self.ids:
            self.engine.abort(request)
        self.ids = []


def tensors(owner: Any) -> list[torch.Tensor]:
    """All different tensors in a tree of dataclasses and lists; tied weights count once."""
    found: dict[int, torch.Tensor] = {}
    stack = [owner]
    while stack:
        each = stack.pop()
        if isinstance(each, torch.Tensor):
            found[each.data_ptr()] = each
        elif isinstance(each, (list, tuple)):
            stack += each
        elif hasattr(each, "__dict__"):
            stack += vars(each).values()
    return list(found.values())


if __name__ == "__main__":
    serve(KVFold)
