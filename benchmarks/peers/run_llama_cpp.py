"""llama.cpp by way of llama-cpp-python's C interface: one context, a batch per step, flash attention, greedy.

`--model` is a GGUF file whose weights are what `--weights` says; `--kv` is f16 or q8_0.
"""

import argparse
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.protocol import Prompts, serve

KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
BATCH = 2048  # tokens of one llama_decode; its default
FLASH_ATTENTION = 1  # quantised values need it, and "auto" chooses it here


class LlamaCpp:
    def __init__(self, options: argparse.Namespace) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(options.model.encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {options.model}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = options.batch * (-(-options.context // 256) * 256)
        context.n_seq_max = options.batch
        context.n_batch = BATCH
        context.n_threads = context.n_threads_batch = options.threads
        context.type_k = context.type_v = KV_TYPES[options.kv]
        context.flash_attn_type = FLASH_ATTENTION
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context: see its log")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.options = options
        self.lengths: list[int] = []
        self.last: list[int] = []

    def about(self) -> dict[str, Any]:
        named = {"weights": self.options.weights, "kv": self.options.kv}
        read = llama_cpp.llama_model_size(self.model)
        return {"peer": "llama.cpp", "version": f"llama-cpp-python {version('llama-cpp-python')}", **named,
                "weight_bytes": read}  # fmt: skip

    def read(self, prompts: Prompts) -> None:
        self.lengths, self.last = [0] * len(prompts), [0] * len(prompts)
        self.batch.n_tokens = 0
        for sequence, prompt in enumerate(prompts):
            for index, token in enumerate(prompt):
                self._add(sequence, token, wanted=index == len(prompt) - 1)
                if self.batch.n_tokens == BATCH:
                    self._run()
        self._run()

    def step(self) -> None:
        for sequence, token in enumerate(self.last):
            self._add(sequence, token, wanted=True)
        self._run()

    def _add(self, sequence: int, token: int, *, wanted: bool) -> None:
        batch, at = self.batch, self.batch.n_tokens
        batch.token[at], batch.pos[at] = token, self.lengths[sequence]
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        batch.logits[at] = wanted
        batch.n_tokens += 1
        self.lengths[sequence] += 1

    def _run(self) -> None:
        if not self.batch.n_tokens:
            return
        failed = llama_cpp.llama_decode(self.context, self.batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        for at in range(self.batch.n_tokens):
            if self.batch.logits[at]:
                logits = llama_cpp.llama_get_logits_ith(self.context, at)
                row = np.ctypeslib.as_array(logits, shape=(self.vocabulary,))
                self.last[self.batch.seq_id[at][0]] = int(row.argmax())
        self.batch.n_tokens = 0

    def held(self) -> tuple[int, int]:
        size = llama_cpp.llama_state_seq_get_size
        return sum(self.lengths), sum(size(self.context, each) for each in range(len(self.lengths)))

    def drop(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, False)
        self.lengths, self.last = [], []


if __name__ == "__main__":
    serve(LlamaCpp)
