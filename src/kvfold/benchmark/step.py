"""Where the time of a decoding step goes."""

import cProfile
import inspect
import pstats
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import CodeType
from typing import Any

from kvfold.attention.cpu.sealed import CpuSealedPlan
from kvfold.attention.cpu.staged import CpuStagedPlan
from kvfold.attention.reference import ReferencePlan
from kvfold.attention.staged import StagedPlan
from kvfold.config.progress import SILENT, Progress
from kvfold.engine.engine import Engine
from kvfold.engine.llm import LLM
from kvfold.engine.params import SamplingParams
from kvfold.engine.sampler import Sampler
from kvfold.engine.scheduler import Scheduler
from kvfold.model.decoder import Decoder
from kvfold.model.heads import split_heads
from kvfold.model.linear import TorchLinear
from kvfold.model.loading import load_spec
from kvfold.model.packed import PackedLinear
from kvfold.model.packed_heads import split_heads_packed
from kvfold.native.program import Kind, timing

LINEAR, HEADS, ATTENTION = "linear layers", "RoPE and maps", "attention"
_PARTS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    LINEAR: (TorchLinear.__call__, PackedLinear.__call__),
    HEADS: (split_heads, split_heads_packed),
    ATTENTION: (CpuSealedPlan.attend, CpuStagedPlan.attend, ReferencePlan.attend, StagedPlan.attend),
    "logits": (Decoder.logits,),
    "sampling": (Sampler.sample,),
    "scheduling and pages": (Scheduler.schedule,),
}
_KINDS = {Kind.LINEAR: LINEAR, Kind.HEADS: HEADS, Kind.ATTENTION: ATTENTION}
REST = "everything else"
CHUNK = 512  # tokens of a prompt on their way


@dataclass(frozen=True)
class StepReport:
    """batch, context: sequences and the tokens that each holds at first. seconds: of a step, the median and the least,
    timed alone; parts: the share of each part, profiled in steps of their own."""

    batch: int
    context: int
    steps: int
    seconds: float
    least_seconds: float
    parts: dict[str, float]


def profile_steps(
    model: str | Path,
    kv: str,
    batch: int,
    context: int,
    steps: int,
    *,
    progress: Progress = SILENT,
    **options: Any,
) -> StepReport:
    """Decodes `batch` sequences after prompts of `context` tokens: `steps` steps timed, then as many under a profiler.

    options: of `LLM`. Raises what `LLM` raises, and PromptError for a context that the model does not take.
    """
    spec = load_spec(model)
    room = context + 2 * steps + 4
    memory = batch * (room + CHUNK) * 2 * spec.kv_elements
    llm = LLM(model, kv=kv, kv_memory=memory, max_sequences=batch, prefix_caching=False, progress=progress, **options)
    engine = llm.engine
    params = SamplingParams(temperature=0.0, max_tokens=2 * steps + 4, ignore_eos=True)
    prompts = [[(7919 * (i + 1) + 31 * t) % spec.vocab for t in range(context)] for i in range(batch)]
    requests = [engine.add_request(prompt, params, context=context) for prompt in prompts]
    try:
        with progress.task("reading prompts", batch * context) as advance:
            started: set[str] = set()
            while len(started) < batch:
                before = engine.prompt_tokens
                started |= {output.request_id for output in engine.step()}
                advance(engine.prompt_tokens - before)
        engine.step()
        seconds = [_timed(engine) for _ in range(steps)]
        parts = _profiled(engine, steps)
    finally:
        for request in requests:
            engine.abort(request)
    return StepReport(batch, context, steps, median(seconds), min(seconds), parts)


def _timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def _profiled(engine: Engine, steps: int) -> dict[str, float]:
    profile = cProfile.Profile()
    with timing() as kinds:
        profile.enable()
        for _ in range(steps):
            engine.step()
        profile.disable()
    calls = _Calls(profile)
    spent = {name: sum(map(calls.seconds, own)) for name, own in _PARTS.items()}
    spent[LINEAR] -= sum(calls.seconds(each, Decoder.logits) for each in _PARTS[LINEAR])
    for kind, part in _KINDS.items():
        spent[part] += kinds[kind]
    spent[REST] = calls.total - sum(spent.values())
    return {name: each / calls.total for name, each in spent.items()}


class _Calls:
    def __init__(self, profile: cProfile.Profile) -> None:
        stats: Any = pstats.Stats(profile)
        self.total: float = stats.total_tt
        self._stats = stats.stats

    def seconds(self, function: Callable[..., Any], caller: Callable[..., Any] | None = None) -> float:
        """Spent in a function and all that it calls; caller: only where this one called it."""
        *_, cumulative, callers = self._stats.get(_key(function), (0.0, {}))
        if caller is None:
            return float(cumulative)
        return float(callers.get(_key(caller), (0.0,))[-1])


def _key(function: Callable[..., Any]) -> tuple[str, int, str]:
    code: CodeType = inspect.unwrap(function).__code__
    return code.co_filename, code.co_firstlineno, code.co_name
