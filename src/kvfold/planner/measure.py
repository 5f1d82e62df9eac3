"""Times steps of the real engine: prompts read, sequences decoding, both at once, pages copied."""

import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from random import Random
from statistics import fmean, median

import numpy as np
import torch

from kvfold.config.progress import SILENT, Progress
from kvfold.engine.engine import Engine
from kvfold.engine.params import SamplingParams
from kvfold.engine.sequence import Sequence
from kvfold.kv.layout import CacheLayout
from kvfold.kv.pool import NO_PAGE, PagePool, Pages
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.tables import PageTables
from kvfold.planner.errors import ProfileError
from kvfold.planner.fit import Point, nonnegative_least_squares
from kvfold.planner.grid import Case, Grid
from kvfold.planner.latency import StepWork, TransferCost, chunk_squares

Tables = PageTables | StagedTables
Timed = tuple[StepWork, float]
COPIES = 5


class Bench:
    """An engine and, for each lane and context, the tables of one sequence that was really read: decoding sequences
    are copies of it with pages of their own, because pages that several share would be read from the caches."""

    def __init__(self, engine: Engine, vocab: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.engine = engine
        self._clock = clock
        self._vocab = vocab
        self._read: dict[tuple[int, int], Tables] = {}
        self._made = 0

    def period(self, lane: int) -> int:
        """Tokens between two steps of a decoding sequence that do more: seal a block, or decide what stays."""
        layout = self.engine.lanes[lane].layout
        return layout.seal if isinstance(layout, CacheLayout) else layout.every

    def prepare(self, lane: int, contexts: Seq[int], progress: Progress) -> None:
        """Reads one prompt of each length."""
        with progress.task(f"reading {self.engine.lanes[lane].label}", sum(contexts)) as advance:
            for context in contexts:
                sequence = self._add(lane, context, 2)
                while not sequence.output.token_ids:
                    self.engine.step()
                self._read[lane, context] = sequence.held.fork(self.engine.memory.pool)
                self._abort([sequence])
                advance(context)

    def run(self, lane: int, case: Case, steps: int) -> list[Timed]:
        """One repetition of a case: one entry for each step that reads a prompt, or one for the mean of decoding."""
        decoding = [self._decoding(lane, case.context, steps + 4) for _ in range(case.batch)]
        prompts: list[Sequence] = []
        try:
            if decoding:
                self.engine.step()  # the first step makes what later ones reuse
            prompts = [self._add(lane, case.length, 2) for _ in range(case.prompts)]
            if prompts:
                return self._reading(prompts, decoding)
            timed = [self._timed(decoding, []) for _ in range(steps)]
            return [(timed[len(timed) // 2][0], fmean(seconds for _, seconds in timed))]
        finally:
            self._abort([*decoding, *prompts])

    def copying(self, lane: int) -> list[tuple[int, float]]:
        """Bytes of sequences, and seconds to take their pages out of the pool and to put them in elsewhere."""
        pool = self.engine.memory.pool
        found = []
        for source in (tables for (own, _), tables in self._read.items() if own == lane):
            pages = source.pages()
            target = pool.allocate(len(pages))
            seconds = []
            for _ in range(COPIES):
                start = self._clock()
                wire = pool.data[torch.from_numpy(pages).long()].clone()
                pool.data[torch.from_numpy(target).long()] = wire
                seconds.append(self._clock() - start)
            pool.release(target)
            found.append((len(pages) * pool.page_bytes, median(seconds)))
        return found

    def release(self) -> None:
        for tables in self._read.values():
            tables.release(self.engine.memory.pool)
        self._read.clear()
        self.engine.check_integrity()

    def _reading(self, prompts: Seq[Sequence], decoding: Seq[Sequence]) -> list[Timed]:
        timed = []
        while any(not s.output.token_ids for s in prompts):
            timed.append(self._timed(decoding, prompts))
            if decoding:
                break  # one step with both
        return timed

    def _timed(self, decoding: Seq[Sequence], prompts: Seq[Sequence]) -> Timed:
        before = [s.computed for s in prompts]
        start = self._clock()
        self.engine.step()
        seconds = self._clock() - start
        chunks = [(p, s.computed - p) for p, s in zip(before, prompts, strict=True)]
        pages = sum(len(s.held.pages()) for s in decoding)
        squares = sum(chunk_squares(p, n) for p, n in chunks)
        size = pages * self.engine.memory.pool.page_bytes
        return StepWork(sum(n for _, n in chunks), squares, size, len(decoding)), seconds

    def _add(self, lane: int, length: int, outputs: int) -> Sequence:
        self._made += 1
        ids = [(7919 * self._made + 31 * t) % self._vocab for t in range(length)]
        params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
        self.engine.add_request(ids, params, lane=lane, context=length)
        return self.engine.scheduler.waiting[-1]

    def _decoding(self, lane: int, context: int, outputs: int) -> Sequence:
        """A running sequence whose cache holds `context` tokens."""
        pool, scheduler = self.engine.memory.pool, self.engine.scheduler
        sequence = self._add(lane, context + 1, outputs)
        scheduler.waiting.remove(sequence)
        sequence.tables = self._read[lane, context].fork(pool)
        _own(pool, sequence.tables)
        scheduler.running.append(sequence)
        return sequence

    def _abort(self, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            self.engine.abort(sequence.request.id)


def measure(
    bench: Bench, lanes: Seq[int], grid: Grid, progress: Progress = SILENT
) -> list[tuple[list[Point], TransferCost]]:
    """For each lane the median of every step of the grid, lanes and cases in turns, and what copying pages costs."""
    contexts = sorted({case.context for case in grid.cases if case.batch})
    seconds: dict[tuple[int, Case, int], list[float]] = defaultdict(list)
    work: dict[tuple[int, Case, int], StepWork] = {}
    for lane in lanes:
        bench.prepare(lane, contexts, progress)  # which warms everything up, too
    turns = [(lane, case) for case in grid.cases for lane in lanes]
    rng = Random(0)
    with progress.task("measuring steps", len(turns) * grid.repetitions) as advance:
        for _ in range(grid.repetitions):
            rng.shuffle(turns)
            for lane, case in turns:
                for step, (done, taken) in enumerate(bench.run(lane, case, grid.spanning(bench.period(lane)))):
                    work[lane, case, step] = done
                    seconds[lane, case, step].append(taken)
                advance(1)
    found = []
    for lane in lanes:
        own = [key for key in work if key[0] == lane]
        points = [Point(work[key], median(seconds[key]), key[1].held_out) for key in own]
        points.sort(key=lambda p: (p.work.batch, p.work.tokens, p.work.squares, p.work.kv_bytes))
        found.append((points, transfer_cost(bench.copying(lane))))
    bench.release()
    return found


def transfer_cost(copies: Seq[tuple[int, float]]) -> TransferCost:
    """Overhead and bandwidth of (bytes, seconds). Raises ProfileError where there is nothing to go by."""
    if not copies:
        raise ProfileError("no pages were copied; measure a grid with decoding sequences")
    seconds = np.array([s for _, s in copies])
    rows = np.array([(1.0, size) for size, _ in copies]) / seconds[:, None]
    (overhead, per_byte), _ = nonnegative_least_squares(rows, np.ones(len(copies)))
    # Where the overhead explains everything, bytes are at least as fast as the fastest copy.
    rate = 1 / per_byte if per_byte > 0 else max(size / s for size, s in copies)
    return TransferCost(float(overhead), float(rate))


def _own(pool: PagePool, tables: Tables) -> None:
    """Gives forked tables pages of their own, with the same content."""
    arrays: list[Pages] = [tables.near, tables.far] if isinstance(tables, PageTables) else [tables.pages_of]
    for array in arrays:
        held = array != NO_PAGE
        shared = array[held]
        fresh = pool.allocate(len(shared))
        pool.copy(shared, fresh)
        array[held] = fresh
        pool.release(shared)
