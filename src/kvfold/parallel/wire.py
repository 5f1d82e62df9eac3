"""What goes from rank to rank: bytes, counted by kind. The one place that calls torch.distributed."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from kvfold.parallel.errors import ParallelError

Message = Mapping[str, Tensor]
"""Parts of one message by kind, uint8 [n] each; sender and receiver know order and sizes."""


@dataclass
class Sent:
    """Bytes that this rank handed to collectives for others, by kind, and how many messages they were."""

    bytes: Counter[str] = field(default_factory=Counter)
    messages: int = 0

    def add(self, message: Message) -> None:
        sizes = {kind: part.numel() for kind, part in message.items()}
        self.bytes.update(sizes)
        self.messages += sum(sizes.values()) > 0

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class Wire:
    """Collectives of one process group over bytes. NCCL moves the GPU's memory, so there tensors go through it.

    Raises ParallelError where a rank is lost; the group is of no use afterwards.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sent = Sent()
        self._group = group
        nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def swap(self, messages: Sequence[Message], sizes: Sequence[Mapping[str, int]]) -> list[dict[str, Tensor]]:
        """All-to-all: a message for each rank (itself included) against one from each.

        sizes: bytes of the parts that come from each rank. Returns them, uint8, by kind.
        """
        for rank, message in enumerate(messages):
            if rank != self.rank:
                self.sent.add(message)
        out = [_joined(message, self._device) for message in messages]
        lengths = [sum(each.values()) for each in sizes]
        found = torch.empty(sum(lengths), dtype=torch.uint8, device=self._device)
        with self._named():
            dist.all_to_all_single(found, torch.cat(out), lengths, [len(x) for x in out], group=self._group)
        pieces = found.cpu().split(lengths)
        return [_parts(piece, each) for piece, each in zip(pieces, sizes, strict=True)]

    def pass_on(
        self, sends: Sequence[tuple[int, Message]], receives: Sequence[tuple[int, Mapping[str, int]]]
    ) -> Callable[[], list[dict[str, Tensor]]]:
        """Starts messages to some ranks and from some, and returns a function that waits for them.

        Messages without bytes are neither sent nor waited for: both sides know the sizes.
        """
        operations: list[dist.P2POp] = []
        held: list[Tensor] = []  # buffers must outlive the transfer
        for rank, message in sends:
            data = _joined(message, self._device)
            if data.numel():
                self.sent.add(message)
                held.append(data)
                operations.append(dist.P2POp(dist.isend, data, group=self._group, group_peer=rank))
        buffers = []
        for rank, sizes in receives:
            buffer = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=self._device)
            buffers.append((buffer, sizes))
            if buffer.numel():
                operations.append(dist.P2POp(dist.irecv, buffer, group=self._group, group_peer=rank))
        with self._named():
            works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> list[dict[str, Tensor]]:
            with self._named():
                for work in works:
                    work.wait()
            held.clear()
            return [_parts(buffer.cpu(), sizes) for buffer, sizes in buffers]

        return wait

    def gather(self, data: bytes, size: int) -> list[bytes]:
        """What each rank gives, at most `size` bytes; not counted."""
        own = torch.zeros(size + 8, dtype=torch.uint8)
        own[: 8 + len(data)] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little") + data), dtype=torch.uint8)
        found = [torch.empty(size + 8, dtype=torch.uint8, device=self._device) for _ in range(self.ranks)]
        with self._named():
            dist.all_gather(found, own.to(self._device), group=self._group)
        raw = [bytes(each.cpu().numpy()) for each in found]
        return [each[8 : 8 + int.from_bytes(each[:8], "little")] for each in raw]

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise ParallelError(
                f"rank {self.rank} lost another rank ({reason}); see what ended it, then start all ranks again"
            ) from error


def _joined(message: Message, device: torch.device) -> Tensor:
    parts = [part.flatten() for part in message.values()]
    return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)).to(device)


def _parts(data: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, data.split(list(sizes.values())), strict=True)) if sizes else {}
