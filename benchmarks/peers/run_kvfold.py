"""kvfold: its engine, step by step, without prefix caching. `--kv` is a method."""

import argparse
from typing import Any

import torch

import kvfold
from benchmarks.peers.protocol import Prompts, serve
from kvfold import LLM, SamplingParams
from kvfold.model.linear import Linear

WEIGHTS = {
    "auto": {},
    "fp32": {"dtype": "float32", "kv_dtype": "bfloat16"},
    "bf16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
}
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
            max_sequences=options.batch,
            prefix_caching=False,
            threads=options.threads,
            **WEIGHTS[options.weights],
        )
        self.engine = self.llm.engine
        self.options = options

    def about(self) -> dict[str, Any]:
        decoder, own = self.llm.model.decoder, self.options.weights
        kv = "bf16" if self.options.kv == "none" else self.options.kv
        weights = NAMES[decoder.dtype] if own == "auto" else own
        named = {"weights": weights, "kv": kv, "weight_bytes": sum(each.nbytes for each in self._layers())}
        return {"peer": "kvfold", "version": kvfold.__version__, **named}

    def _layers(self) -> list[Linear]:
        """Everything that a step reads."""
        weights = self.llm.model.decoder.weights
        mlps = [linear for layer in weights.layers for linear in (layer.mlp.up, layer.mlp.down)]
        attention = [linear for own in self.engine.lanes[0].weights for linear in (own.qkv, own.out)]
        return [weights.head, *mlps, *attention]

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


if __name__ == "__main__":
    serve(KVFold)
