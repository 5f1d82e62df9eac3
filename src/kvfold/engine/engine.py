"""The step loop: schedule, run, sample, and tell what is new."""

import itertools
import time
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvfold.attention.base import AttentionBackend
from kvfold.attention.choose import choose_backend
from kvfold.config.engine import EngineConfig
from kvfold.engine.handover import Arriving, Handovers
from kvfold.engine.lane import MethodLane
from kvfold.engine.memory import KVMemory
from kvfold.engine.outputs import CompletionOutput, FinishReason, KVUsage, Logprob, RequestMetrics, RequestOutput
from kvfold.engine.params import SamplingParams
from kvfold.engine.prompts import check_ids
from kvfold.engine.row_state import RowState
from kvfold.engine.runner import Runner, StepResult
from kvfold.engine.sampler import Sampler
from kvfold.engine.scheduler import Scheduler
from kvfold.engine.sequence import LogitsTap, Request, Sequence
from kvfold.engine.stats import EngineStats, PoolMap, collect_stats, map_pool
from kvfold.errors import PromptError
from kvfold.kv.staged import StagedLayout
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.wire import Tail
from kvfold.model.decoder import Decoder

if TYPE_CHECKING:  # xgrammar is read with the first grammar
    from kvfold.engine.grammar_state import GrammarReader


class Engine:
    """Serves requests over one model, one pool of KV pages and one or several compression methods (lanes)."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        lanes: Seq[MethodLane],
        config: EngineConfig,
        backend: AttentionBackend | None = None,
    ) -> None:
        self.lanes = list(lanes)
        layouts, stagings = [lane.layout for lane in lanes], [lane.staging for lane in lanes]
        self.memory = KVMemory(config.kv_memory, layouts, stagings, config.chunk)
        self.scheduler = Scheduler(config, self.memory, self._settle)
        self._spec = decoder.spec
        self._tokenizer = tokenizer
        self._config = config
        self._runner = Runner(decoder, lanes, self.memory, backend or choose_backend())
        self._sampler = Sampler()
        self.handovers = Handovers(self.lanes, self.memory, self.scheduler, config.max_sequences)
        self.stalled = False  # the last step computed nothing: others have to fetch what memory is full of
        self._requests: dict[str, Request] = {}
        self._ids = itertools.count()
        # Totals since the start; a prompt that is computed again after preemption counts again.
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.dropped_tokens = 0.0  # by methods, averaged over heads

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add_request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        lane: int = 0,
        request_id: str | None = None,
        grammar: bytes | None = None,
        context: int | None = None,
        tap: LogitsTap | None = None,
        handover: bool = False,
        outputs: Seq[Seq[int] | None] = (),
        arrived: tuple[Arriving, Tail] | None = None,
    ) -> str:
        """Queues a request and returns its id.

        grammar: from a `GrammarCompiler` of this model; each completion must follow it. context: prompt tokens that
        a method with compress="context" compresses before it reads the others. tap: receives logits of the prompt.
        handover: after its first token it waits in `handovers.outbox` for another engine. outputs: what each of its
        completions has said already, elsewhere, None where it has ended. arrived: the cache of all tokens but the last.
        Raises PromptError or MemoryLimitError for a prompt that can never be served, GrammarError for bytes that
        are no grammar.
        """
        request_id = request_id if request_id is not None else str(next(self._ids))
        if request_id in self._requests:
            raise PromptError(f"request id {request_id!r} is in use; choose another")
        spec, length = self._spec, len(prompt_token_ids)
        check_ids(prompt_token_ids, spec.vocab, spec.max_positions)
        params.check_vocabulary(spec.vocab)
        context = self.lanes[lane].context(length, context)
        self.memory.check_prompt(lane, length, context)
        limit = self.memory.longest(lane, params.last_position(length, spec.max_positions), context)
        metrics = RequestMetrics(time.monotonic())
        request = Request(request_id, prompt, list(prompt_token_ids), params, lane, metrics, context, tap, handover)
        for index in range(params.n):
            row = RowState.create(
                params,
                request.prompt_token_ids,
                eos_token_ids=spec.eos_token_ids,
                request_id=request_id,
                index=index,
                engine_seed=self._config.seed,
                grammar=None if grammar is None else self._grammars.start(grammar),
            )
            request.sequences.append(Sequence(request, row, self._tokenizer, limit, index))
        going_on = [s for s, said in zip(request.sequences, outputs, strict=False) if s.resume(said)]
        if arrived is not None:
            self.handovers.accept(*arrived, going_on)
        else:
            # The others of n sequences that have said nothing join when the first one has computed the prompt.
            for sequence in going_on or request.sequences[:1]:
                self.scheduler.add(sequence)
        self._requests[request_id] = request
        return request_id

    @cached_property
    def _grammars(self) -> "GrammarReader":
        from kvfold.engine.grammar_state import GrammarReader

        return GrammarReader(self._tokenizer, self._spec.vocab, self._spec.eos_token_ids)

    def outputs(self, request_id: str) -> list[CompletionOutput]:
        """What the completions of a request that has not ended have so far."""
        return [s.output for s in self._requests[request_id].sequences]

    def abort(self, request_id: str) -> RequestOutput | None:
        """Cancels a request and frees its pages; None where there is no such request."""
        self.handovers.release(request_id, "the request was cancelled")
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for sequence in request.sequences:
            if not sequence.output.finished:
                self._finish(sequence, "abort", None)
        return self._output(request)

    def step(self) -> list[RequestOutput]:
        """One forward pass. Returns the requests that gained tokens, with everything they have so far."""
        scheduled = self.scheduler.schedule()
        self.stalled = not scheduled
        if not scheduled:
            return []
        self.prompt_tokens += sum(s.prompt_count for s in scheduled)
        for item in scheduled:
            self.handovers.begin(item)
        result = self._runner.run(scheduled, self.handovers.outbox)
        self._collect_prompt_logprobs(result)
        for item in scheduled:
            tables = item.sequence.held
            if not isinstance(tables, StagedTables):
                self._snapshot(item.sequence)
            elif tables.due:
                self._remember_context(item.sequence)
                self._settle(item.sequence)
        changed = self._sample(result)
        for request in changed:
            if request.handover:
                self.handovers.finish(request)
            if request.finished:
                del self._requests[request.id]
        return [self._output(request) for request in changed]

    def stats(self) -> EngineStats:
        """What runs and waits now, the pages in use, and totals since the start."""
        labels = [lane.label for lane in self.lanes]
        totals = (self.prompt_tokens, self.generated_tokens, round(self.dropped_tokens))
        return collect_stats(labels, self.scheduler, self.memory, 2 * self._spec.kv_elements, *totals)

    def pool_map(self) -> PoolMap:
        """Which method holds which part of the page pool."""
        return map_pool(self.scheduler, self.memory)

    def check_integrity(self) -> None:
        """Raises AssertionError unless tables, snapshots and pool agree about every page."""
        self.memory.check_integrity([s.held for s in self.scheduler.running] + self.handovers.tables())

    def _collect_prompt_logprobs(self, result: StepResult) -> None:
        for sequence, _, values in result.prompt_logprobs:
            request = sequence.request
            if request.prompt_logprobs is None:
                request.prompt_logprobs = [None]
            request.prompt_logprobs += values.as_dicts()

    def _settle(self, sequence: Sequence) -> None:
        """Compresses what a staged sequence holds."""
        staging, tables = self.lanes[sequence.request.lane].staging, sequence.held
        assert staging is not None and isinstance(tables, StagedTables)  # noqa: PT018
        before = tables.resident
        staging.settle(self.memory.pool, tables)
        self.dropped_tokens += before - tables.resident
        self.scheduler.reconsider()

    def _snapshot(self, sequence: Sequence) -> None:
        """Keeps the state of prompts, at block boundaries and at their end, for requests with the same beginning:
        the next turn of a conversation begins with this one's prompt, whatever becomes of the answer's tokens."""
        computed, prompt = sequence.computed, len(sequence.request.prompt_token_ids)
        if computed == prompt or (computed % self._config.prefix_block == 0 and computed < prompt):
            self._remember(sequence)

    def _remember_context(self, sequence: Sequence) -> None:
        """Keeps a context as it is before it is compressed, for other questions about it and other staged methods."""
        request, layout = sequence.request, sequence.held.layout
        inside = sequence.computed == request.context < len(request.prompt_token_ids)
        if inside and isinstance(layout, StagedLayout) and layout.chunk is None:
            self._remember(sequence)
            # A shared page frees nothing when it is dropped: if there is no room for both, the snapshot goes again.
            self.memory.reserve(sequence.held, sequence.computed)

    def _remember(self, sequence: Sequence) -> None:
        if self._config.prefix_caching:
            tables = sequence.held.fork(self.memory.pool)
            self.memory.prefixes[sequence.request.lane].insert(sequence.tokens[: tables.length], tables)
            self.scheduler.reconsider()

    def _sample(self, result: StepResult) -> list[Request]:
        sequences, rows = [], []
        for row, sequence in enumerate(result.ready):
            started = [sequence]
            if not sequence.output.token_ids and sequence.output.index == 0:
                started += self._fork(sequence)
            sequences += started
            rows += [row] * len(started)
        if not sequences:
            return []
        sampled = self._sampler.sample(result.logits[rows], [s.row for s in sequences])
        now = time.monotonic()
        for index, sequence in enumerate(sequences):
            token = sampled.token_ids[index]
            if token is None:
                self._fail(sequence.request, sampled.errors[index])
            elif not sequence.output.finished:  # as it is where another completion of its request failed
                sequence.request.metrics.first_token_time = sequence.request.metrics.first_token_time or now
                self._append(sequence, token, sampled.logprobs[index])
        return list(dict.fromkeys(s.request for s in sequences))

    def _fork(self, first: Sequence) -> list[Sequence]:
        others = first.request.sequences[1:]
        for sequence in others:
            sequence.tables = first.held.fork(self.memory.pool)
            self.scheduler.join(sequence, first)
        return others

    def _append(self, sequence: Sequence, token: int, logprobs: dict[int, Logprob] | None) -> None:
        self.generated_tokens += 1
        if sequence.take(token, logprobs):
            self._retire(sequence)

    def _fail(self, request: Request, reason: str | None) -> None:
        """Ends a request that cannot go on, with all its completions that are not finished."""
        for sequence in request.sequences:
            if not sequence.output.finished:
                self._finish(sequence, "error", reason)

    def _finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | None) -> None:
        sequence.end(reason, stop_reason)
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """A sequence has ended: what it held is counted, kept for others where that makes sense, and given back."""
        sequence.request.metrics.finished_time = time.monotonic()
        if sequence.tables is not None:
            sequence.kv_bytes, sequence.kv_tokens = sequence.tables.nbytes, sequence.computed
            complete = sequence.output.finish_reason in ("stop", "length")
            if complete and not isinstance(sequence.tables, StagedTables):
                self._remember(sequence)
        self.scheduler.release(sequence)

    def _output(self, request: Request) -> RequestOutput:
        return RequestOutput(
            request.id,
            request.prompt,
            request.prompt_token_ids,
            request.prompt_logprobs,
            [s.output for s in request.sequences],
            request.finished,
            self._kv_usage(request) if request.finished else KVUsage(),
            request.metrics,
        )

    def _kv_usage(self, request: Request) -> KVUsage:
        """What the sequences of a request held when they ended."""
        sequences = request.sequences
        tokens = sum(s.kv_tokens for s in sequences)
        return KVUsage.of(sum(s.kv_bytes for s in sequences), tokens, self._spec.kv_elements)
