"""A cache in plain lists that reads one sequence token by token, and what an engine computes to feed it with.

Nothing here calls kvfold.methods or knows of pages: per layer and KV head a list of the positions that are held.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.reference import ReferenceBackend
from kvfold.engine.engine import Engine
from kvfold.kv.staged_tables import StagedTables
from kvfold.methods.held import stored_rows
from tests.engine.tiny import greedy


@dataclass
class NaiveCache:
    """held[layer][head]: positions, oldest first. keys, values [layer]: float64 [T, G, d], of all positions ever read;
    queries [layer]: [T, H, d]. attention[layer][head]: float64 [T queries, g, T keys], 0 where nothing was seen;
    seen[layer][head]: bool [T queries, T keys]."""

    windows: tuple[int | None, ...]
    kv_heads: int
    group: int
    scale: float
    most: int
    dims: int
    length: int = 0
    held: list[list[list[int]]] = field(init=False)
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)
    queries: list[Tensor] = field(init=False)
    attention: list[list[Tensor]] = field(init=False)
    seen: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        layers, heads, most = range(len(self.windows)), range(self.kv_heads), self.most
        self.held = [[[] for _ in heads] for _ in layers]
        self.keys, self.values = (
            [torch.zeros(most, self.kv_heads, self.dims, dtype=torch.float64) for _ in layers] for _ in range(2)
        )
        self.queries = [torch.zeros(most, self.kv_heads * self.group, self.dims, dtype=torch.float64) for _ in layers]
        self.attention = [[torch.zeros(most, self.group, most, dtype=torch.float64) for _ in heads] for _ in layers]
        self.seen = [[torch.zeros(most, most, dtype=torch.bool) for _ in heads] for _ in layers]

    def read(self, layer: int, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token of one layer: q [H, d], k and v [G, d]. Returns its attention output [H, d]."""
        self.queries[layer][position], self.keys[layer][position], self.values[layer][position] = q, k, v
        out = torch.zeros(q.shape, dtype=torch.float64)
        window = self.windows[layer]
        for head in range(self.kv_heads):
            self.held[layer][head].append(position)
            visible = [p for p in self.held[layer][head] if window is None or position - p < window]
            keys, values = self.keys[layer][visible, head], self.values[layer][visible, head]
            for i in range(self.group):
                own = head * self.group + i
                weights = (keys @ q[own].double() * self.scale).softmax(0)
                out[own] = weights @ values
                self.attention[layer][head][position, i, visible] = weights
            self.seen[layer][head][position, visible] = True
        return out

    def received(self, layer: int, head: int, queries: list[int], power: int = 1) -> dict[int, float]:
        """What each held token got from some queries, the group's query heads added."""
        got = (self.attention[layer][head][queries] ** power).sum((0, 1))
        return {p: float(got[p]) for p in self.held[layer][head]}


@dataclass
class Recorder:
    """An attention backend that remembers what one sequence computed: [layer][position] -> q, k, v, out."""

    read: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)
    scale: float = 0.0

    def plan(self, pool: Any, layout: Any, steps: Any, scale: float) -> "_RecordedPlan":
        self.scale = scale
        return _RecordedPlan(self, ReferenceBackend().plan(pool, layout, steps, scale), steps)


@dataclass
class _RecordedPlan:
    recorder: Recorder
    plan: Any
    steps: Any

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self.plan.attend(layer, q, k, v)
        [step] = self.steps
        for i in range(step.count):
            self.recorder.read[layer, step.tables.length + i] = tuple(x[i].clone() for x in (q, k, v, out))  # type: ignore[assignment]
        return out, lse


Choice = Callable[[NaiveCache, int, int], None]


def follow(
    engine: Engine,
    recorder: Recorder,
    prompt: list[int],
    generate: int,
    event: Callable[[int], bool],
    drop: Callable[[NaiveCache, int], None],
    check: Callable[[NaiveCache, StagedTables], None],
    context: int | None = None,
) -> NaiveCache:
    """Runs one request and a naive cache beside it. After every step their attention must be the same; where `event`
    says so `drop` is called with the number of tokens read; `check` compares what both hold after each step."""
    spec = engine._spec
    most = len(prompt) + generate
    windows = tuple(layer.window for layer in spec.layer_specs)
    cache = None
    engine.add_request(prompt, greedy(generate), context=context)
    while engine.has_unfinished:
        [sequence] = engine.scheduler.running or engine.scheduler.waiting
        engine.step()
        if cache is None:
            group = spec.heads // spec.kv_heads
            cache = NaiveCache(windows, spec.kv_heads, group, recorder.scale, most, spec.head_dim)
        done = cache.length
        while (0, cache.length) in recorder.read:
            for layer in range(len(windows)):
                q, k, v, out = recorder.read[layer, cache.length]
                torch.testing.assert_close(cache.read(layer, cache.length, q, k, v).float(), out, rtol=1e-3, atol=1e-4)
            cache.length += 1
        assert cache.length > done
        if event(cache.length):
            drop(cache, cache.length)
            for layer, window in enumerate(windows):
                if window is not None:
                    cache.held[layer] = [own[-window:] for own in cache.held[layer]]
        if sequence.tables is not None:
            engine.check_integrity()
            check(cache, sequence.tables)
    assert cache is not None
    return cache


def same_rows(cache: NaiveCache, tables: StagedTables, pool: Any, exact: bool = True) -> None:
    """Uncompressed rows of all heads are those that the naive cache holds: bit for bit if nothing was merged."""
    for layer in range(len(cache.windows)):
        for head in range(cache.kv_heads):
            held = cache.held[layer][head]
            rows = stored_rows(pool, tables, 0, layer * cache.kv_heads + head)
            assert len(rows[0]) == len(held), (layer, head, len(rows[0]), len(held))
            for found, ours in zip(rows, (cache.keys[layer], cache.values[layer]), strict=True):
                expected = ours[held, head].float()
                if exact:
                    assert torch.equal(found, expected), (layer, head)
                else:
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def read_prompt(engine: Engine, recorder: Recorder, prompt: list[int]) -> tuple[NaiveCache, StagedTables]:
    """A prompt read uncompressed, by both, and the engine's tables right after the event at its end."""
    engine.add_request(prompt, greedy(3))
    while True:
        engine.step()
        [sequence] = engine.scheduler.running
        tables = sequence.tables
        assert isinstance(tables, StagedTables)
        if tables.settled == len(prompt):
            break
    spec = engine._spec
    windows = tuple(layer.window for layer in spec.layer_specs)
    group = spec.heads // spec.kv_heads
    cache = NaiveCache(windows, spec.kv_heads, group, recorder.scale, len(prompt), spec.head_dim)
    for layer in range(len(windows)):
        for position in range(len(prompt)):
            q, k, v, out = recorder.read[layer, position]
            torch.testing.assert_close(cache.read(layer, position, q, k, v).float(), out, rtol=1e-3, atol=1e-4)
    cache.length = len(prompt)
    return cache, tables
