"""vLLM's CPU build: its engine in this process, step by step, without prefix caching. `--kv` is bf16 or fp8.

Compiled code is kept in the environment's folder. It is made anew for every other limit of lengths and sequences, for
minutes; so both limits are the same in all cells, and the pool holds a sequence of the greatest length at least.
"""

import argparse
import os
import sys
from typing import Any

from benchmarks.peers.protocol import Prompts, serve

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
KV_TYPES = {"bf16": ("auto", 2), "fp8": ("fp8", 1)}
DENSE_TOKEN = 23_040
"""Bytes of a token in a dense 16-bit cache of SmolLM2-135M."""
LENGTH = 8192
SEQUENCES = 32
WEIGHTS = 134_515_008
"""Parameters of SmolLM2-135M, tied ones counted once."""


class VLLM:
    def __init__(self, options: argparse.Namespace) -> None:
        kv, self.element = KV_TYPES[options.kv]
        cache = os.path.join(sys.prefix, "cache")
        os.environ["VLLM_CACHE_ROOT"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        # 0.32's CPU build cannot load what it compiled ahead of time, and compiles again at every start.
        os.environ["VLLM_USE_AOT_COMPILE"] = "0"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # By default vLLM leaves a core to its API server; every peer gets the same threads here.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[: options.threads]))
        room = max(LENGTH, options.batch * options.context) + 256 * (
            options.batch + 1
        )  # blocks, the last ones not full
        from vllm import EngineArgs, LLMEngine, SamplingParams

        self.engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                model=options.model,
                dtype=DTYPES[options.weights],
                kv_cache_dtype=kv,
                kv_cache_memory_bytes=room * DENSE_TOKEN * self.element // 2,
                max_model_len=LENGTH,
                max_num_seqs=SEQUENCES,
                max_num_batched_tokens=2048,
                enable_prefix_caching=False,
                async_scheduling=False,  # so that a step returns its own tokens
                disable_log_stats=True,
            )
        )
        self.params = SamplingParams(temperature=0.0, max_tokens=options.context, ignore_eos=True, detokenize=False)
        self.options = options
        self.lengths: dict[str, int] = {}
        self.requests = 0

    def about(self) -> dict[str, Any]:
        import vllm

        read = WEIGHTS * {"bf16": 2, "fp32": 4}[self.options.weights]
        named = {"weights": self.options.weights, "kv": self.options.kv, "weight_bytes": read}
        return {"peer": "vllm-cpu", "version": vllm.__version__, **named}

    def read(self, prompts: Prompts) -> None:
        self.prompt = len(prompts[0])
        self.lengths = {}
        for prompt in prompts:
            self.requests += 1
            self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, self.params)
        while len(self.lengths) < len(prompts):
            self._step()

    def step(self) -> None:
        given = self._step()
        if given != len(self.lengths):
            raise RuntimeError(f"a step gave tokens to {given} of {len(self.lengths)} sequences: too little KV memory")

    def _step(self) -> int:
        """How many sequences got a token."""
        outputs = self.engine.step()
        for output in outputs:
            # The newest token is not in the cache yet.
            self.lengths[output.request_id] = self.prompt + len(output.outputs[0].token_ids) - 1
        return len(outputs)

    def held(self) -> tuple[int, int]:
        tokens = sum(self.lengths.values())
        return tokens, tokens * DENSE_TOKEN * self.element // 2

    def drop(self) -> None:
        self.engine.abort_request(list(self.lengths))
        self.lengths = {}
        while self.engine.has_unfinished_requests():
            self.engine.step()


if __name__ == "__main__":
    serve(VLLM)
