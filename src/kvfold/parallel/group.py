"""The ranks as one worker: rank 0 says what is done, the others follow."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kvfold.attention.base import AttentionBackend
from kvfold.attention.choose import choose_backend
from kvfold.engine.lane import MethodLane
from kvfold.engine.prompts import check_ids
from kvfold.errors import MemoryLimitError, PromptError
from kvfold.kv.pool import PagePool
from kvfold.model.decoder import Decoder, Lane
from kvfold.model.spec import ModelSpec
from kvfold.parallel.errors import ParallelError
from kvfold.parallel.fitting import check_wire_bits, positional_layout
from kvfold.parallel.identity import Identity
from kvfold.parallel.orders import Order, Orders, Store
from kvfold.parallel.sequence import ShardedSequence
from kvfold.parallel.setting import Setting
from kvfold.parallel.shard import FarShard
from kvfold.parallel.split import Split, Variant, shared_heads
from kvfold.parallel.wire import Sent, Wire


@dataclass(frozen=True)
class Usage:
    """Of one rank: bytes of KV pages it holds, and what it has sent, by kind."""

    held: int
    sent: Sent


class SequenceParallel:
    """One sequence at a time over all ranks of a process group.

    Rank 0 calls `prefill`, `decode` and, at the end, `close`; all others call `follow`, which returns when rank 0
    closes. Every rank has the whole model and its own pages (`n_pages` of them).

    decoder, lane: as an engine has them, the same on all ranks. store: shared by the ranks, for what is to be done.
    backend: attends to what a rank holds while decoding (None: as in `LLM`).
    Raises ParallelError where ranks or method do not fit together, or a rank is lost: at once where its
    process ended, else within the process group's timeout. After that the group is of no use.
    """

    def __init__(
        self,
        decoder: Decoder,
        lane: MethodLane,
        group: dist.ProcessGroup,
        store: Store,
        identity: Identity,
        n_pages: int,
        variant: Variant = "ring",
        wire_bits: int = 16,
        backend: AttentionBackend | None = None,
    ) -> None:
        layout = positional_layout(lane)
        check_wire_bits(wire_bits)
        self.wire = Wire(group)
        self.layout, self.variant = layout, variant
        self._heads = shared_heads(layout.kv_heads, variant, self.wire.ranks)
        self._decoder, self._lane, self._orders = decoder, lane, Orders(store, self.wire.rank)
        spec = decoder.spec
        self._setting = Setting(layout, spec.heads // spec.kv_heads, wire_bits)
        self.pages = identity.agree(self.wire, n_pages)
        self.pool = PagePool(n_pages, layout.page_bytes)
        self._backend = backend or choose_backend()
        self._sequence: ShardedSequence | None = None

    @property
    def rank(self) -> int:
        return self.wire.rank

    @property
    def spec(self) -> ModelSpec:
        return self._decoder.spec

    @property
    def ranks(self) -> int:
        return self.wire.ranks

    def prefill(self, token_ids: Sequence[int], room: int = 1) -> Tensor:
        """Reads a prompt; the sequence before it is forgotten. Returns the logits after its last token, float32 [V].

        room: tokens that may follow. Raises PromptError or MemoryLimitError, before any work, for what can never be
        served.
        """
        self._check(token_ids, room)
        self._order({"do": "prefill", "tokens": list(token_ids)})
        logits = self._prefill(list(token_ids))
        assert logits is not None, "rank 0 has the last token"
        return logits

    def decode(self, token: int) -> Tensor:
        """Appends a token. Returns the logits after it, float32 [V]."""
        if self._sequence is None:
            raise ParallelError("there is no sequence to go on with; call prefill first")
        if self._sequence.length >= self._decoder.spec.max_positions:
            raise PromptError(f"the model takes {self._decoder.spec.max_positions} positions; end the sequence here")
        self._order({"do": "decode"})
        turn = self._sequence.add_token()
        where = torch.tensor([self._sequence.length])
        with torch.inference_mode():
            lane = Lane(slice(0, 1), self._lane.weights, turn.attend)
            hidden = self._decoder.forward(torch.tensor([token]), where, [lane])
            logits = self._decoder.logits(hidden)[0]
        turn.end()
        return logits

    def usage(self) -> list[Usage]:
        """What every rank holds and has sent since it began."""
        self._order({"do": "usage"})
        return self._usage()

    def close(self, patience: float = 5.0) -> None:
        """Lets the other ranks go, waiting up to `patience` seconds until they know it, and gives back all pages."""
        self._forget()
        self._order({"do": "close"})
        if patience:
            self._orders.await_others(self.ranks, patience)

    def follow(self) -> None:
        """Does what rank 0 says until it closes."""
        while True:
            order = self._orders.next()
            if order["do"] == "prefill":
                self._prefill(order["tokens"])
            elif order["do"] == "decode":
                assert self._sequence is not None, "rank 0 decodes after a prompt"
                turn = self._sequence.add_token()
                with torch.inference_mode():
                    for layer in range(self.layout.layers):
                        turn.serve(layer)
                turn.end()
            elif order["do"] == "usage":
                self._usage()
            else:
                self._forget()
                self._orders.heard_last()
                return

    def check_integrity(self) -> None:
        """Raises AssertionError unless the sequence's tables account for every page of this rank's pool."""
        sequence = self._sequence
        self.pool.check_integrity([] if sequence is None else sequence.pages())

    @torch.inference_mode()
    def _prefill(self, token_ids: list[int]) -> Tensor | None:
        self._forget()
        split = Split.of(self.layout, self.variant, self.ranks, len(token_ids))
        scale = self._decoder.spec.attention_scale
        sequence = ShardedSequence(self._setting, split, self.wire, self.pool, scale, self._backend)
        self._sequence = sequence
        positions = torch.from_numpy(split.positions[self.rank])
        if len(positions):
            own = torch.tensor(token_ids)[positions]
            lane = Lane(slice(0, len(own)), self._lane.weights, sequence.read_prompt)
            hidden = self._decoder.forward(own, positions, [lane])
        else:
            spec = self._decoder.spec
            q, k = (
                torch.empty(0, heads, spec.head_dim, dtype=self._decoder.dtype) for heads in (spec.heads, spec.kv_heads)
            )
            for layer in range(self.layout.layers):
                sequence.read_prompt(layer, q, k, k)
        sequence.end_prompt()
        return self._decoder.logits(hidden[-1:])[0] if self.rank == 0 else None

    def _usage(self) -> list[Usage]:
        held = 0 if self._sequence is None else self._sequence.nbytes
        own = {"held": held, "bytes": dict(self.wire.sent.bytes), "messages": self.wire.sent.messages}
        told = [json.loads(each) for each in self.wire.gather(json.dumps(own).encode(), 1024)]
        return [Usage(each["held"], Sent(Counter(each["bytes"]), each["messages"])) for each in told]

    def _forget(self) -> None:
        if self._sequence is not None:
            self._sequence.release()
            self._sequence = None

    def _check(self, token_ids: Sequence[int], room: int) -> None:
        spec, layout, length = self._decoder.spec, self.layout, len(token_ids)
        check_ids(token_ids, spec.vocab, spec.max_positions)
        for rank, pages in enumerate(self.pages):
            need = self.needed_pages(rank, length, min(length + room, spec.max_positions))
            if need > pages:
                raise MemoryLimitError(
                    f"a prompt of {length} tokens and {room} to come need {need * layout.page_bytes} bytes of KV "
                    f"memory on rank {rank}, which has {pages * layout.page_bytes}; raise kv_memory, add ranks or "
                    "compress more"
                )

    def needed_pages(self, rank: int, prompt: int, length: int) -> int:
        """No fewer pages than a rank holds at any time while a sequence grows from its prompt to `length` tokens."""
        layout = self.layout
        split = Split.of(layout, self.variant, self.ranks, prompt)
        units = np.arange((layout.sealed(length) - layout.sinks) // layout.seal)
        if self.variant == "ring":
            own = [np.arange(each.first, each.last) for each in split.units(rank)]
            later = units[units >= (layout.sealed(prompt) - layout.sinks) // layout.seal]
            units = np.concatenate([*own, later[later % self.ranks == rank]])
        near = layout.layers * layout.kv_heads * layout.near_pages if rank == 0 else 0
        return 1 + near + FarShard(self.pool, layout, self._heads[rank]).needed(units, prompt)

    def _order(self, order: Order) -> None:
        if self._orders.full:
            self._orders.tell({"do": "usage"})
            self._usage()  # all ranks have answered, so they have read everything before
            self._orders.clear()
        self._orders.tell(order)
