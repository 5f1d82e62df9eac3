"""When a worker's loop does what."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from kvfold.cluster.messages import Fetch
from kvfold.cluster.worker_loop import Inbox, WorkerLoop
from kvfold.engine.handover import Part
from kvfold.errors import TransferError
from kvfold.kv import wire
from kvfold.server.messages import Add
from tests.engine.handing import step_until
from tests.engine.tiny import Tiny, greedy, tokens


class Enough(BaseException):
    """Ends a loop."""


class Nobody:
    """A transport that finds nobody."""

    def fetch(self, address: str, request_id: str, sizes: Sequence[int]) -> Iterator[Part]:
        raise TransferError("nobody is there")


def test_a_cache_that_is_offered_during_a_step_is_expected_before_the_next(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny("llama")
    source, busy = made.engine("none"), made.engine("none")
    source.add_request(tokens(30, 1), greedy(5), request_id="r", handover=True)
    step_until(source, "r")
    header = wire.pack(wire.HEADER, source.handovers.outbox["r"].header)
    inbox = Inbox(lambda event: None)
    inbox.put(Add("b", tokens(30, 2), greedy(50), 0))
    loop = WorkerLoop(busy, inbox, Nobody())
    step, expect = busy.step, busy.handovers.expect
    steps = 0
    expected_after: list[int] = []

    def counted() -> Any:
        nonlocal steps
        if steps == 2:
            raise Enough
        if steps == 1:
            inbox.put(Fetch(Add("r", tokens(30, 1), greedy(5), 0), "nowhere", header))
        outputs = step()
        steps += 1
        return outputs

    def expecting(*arguments: Any) -> Any:
        expected_after.append(steps)
        return expect(*arguments)

    monkeypatch.setattr(busy, "step", counted)
    monkeypatch.setattr(busy.handovers, "expect", expecting)
    with pytest.raises(Enough):
        loop.run()
    assert expected_after == [2]
