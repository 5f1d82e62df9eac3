"""What attention takes inside the engine, methods and backends in turns in one process.

    python -m benchmarks.backends --prompt 4096 --run 'snapkv(budget=512)@cpu' --run 'snapkv(budget=512)@reference'

Every run is METHOD@BACKEND and serves the same random prompt; one step of each after the other. Prints one JSON line
per run: seconds of prefill and of attention in it, and the median milliseconds of a decode step and of its attention.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold import LLM, SamplingParams
from kvfold.attention.base import AttentionBackend, Plan
from kvfold.attention.choose import choose_backend


class Timed:
    """A backend that adds up the seconds of its plans' attention."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self.spent = 0.0

    def plan(self, *args: Any) -> Plan:
        return _TimedPlan(self, self._backend.plan(*args))


class _TimedPlan:
    def __init__(self, timed: Timed, plan: Plan) -> None:
        self._timed, self._plan = timed, plan

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        result = self._plan.attend(layer, q, k, v)
        self._timed.spent += time.perf_counter() - began
        return result


class Run:
    """One engine with its prompt, and (seconds, of it attention, tokens made) of each step."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        kv, backend = name.rsplit("@", 1)
        self._timed = Timed(choose_backend(backend))
        llm = LLM(options.model, kv=kv, backend=self._timed, threads=options.threads, calibration=options.calibration)
        self.engine = llm.engine
        g = torch.Generator().manual_seed(0)
        prompt = torch.randint(100, 40000, (options.prompt,), generator=g).tolist()
        self.engine.add_request(prompt, SamplingParams(max_tokens=options.output, temperature=0.0, ignore_eos=True))
        self.steps: list[tuple[float, float, int]] = []

    def step(self) -> None:
        self._timed.spent, before, began = 0.0, self.engine.generated_tokens, time.perf_counter()
        self.engine.step()
        made = self.engine.generated_tokens - before
        self.steps.append((time.perf_counter() - began, self._timed.spent, made))

    def report(self) -> dict[str, Any]:
        prefill = [step for step in self.steps if not step[2]]
        decode = [step for step in self.steps if step[2]][1:]  # the first token ends the prompt
        return {
            "run": self.name,
            "prefill_s": round(sum(step[0] for step in prefill), 2),
            "prefill_attention_s": round(sum(step[1] for step in prefill), 2),
            "decode_ms": _median([step[0] for step in decode]),
            "decode_attention_ms": _median([step[1] for step in decode]),
        }


def _median(seconds: Sequence[float]) -> float:
    return round(1e3 * statistics.median(seconds), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--run", action="append", required=True, help="METHOD@BACKEND; may be repeated")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--output", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calibration", type=Path)
    options = parser.parse_args()
    runs = [Run(name, options) for name in options.run]
    while any(run.engine.has_unfinished for run in runs):
        for run in runs:
            if run.engine.has_unfinished:
                run.step()
    for run in runs:
        print(json.dumps(run.report()), flush=True)


if __name__ == "__main__":
    main()
