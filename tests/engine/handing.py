"""One engine reads a prompt, another one goes on, with nothing but bytes between them."""

import msgspec
import numpy as np

from kvfold.engine.engine import Engine
from kvfold.engine.outputs import RequestOutput
from kvfold.engine.params import SamplingParams
from kvfold.kv import wire


def cross(source: Engine, target: Engine, request_id: str, completions: int = 1, lane: int = 0):
    """Brings a cache from one engine's outbox to another engine, as a transport does. Returns what `arrived` takes."""
    outgoing = source.handovers.outbox[request_id]
    header = wire.unpack_header(wire.pack(wire.HEADER, outgoing.header))
    arriving = target.handovers.expect(header, lane, completions)
    assert arriving is not None
    for number in range(outgoing.parts):
        sent = outgoing.part(number, 0)
        data = wire.frame(number, sent) + sent.tobytes()
        found, size, checksum = wire.read_frame(data[: wire.FRAME_BYTES])
        body = np.frombuffer(data[wire.FRAME_BYTES :], np.uint8)
        assert (found, size) == (number, len(body))
        wire.check(body, checksum)
        if number < outgoing.parts - 1:
            arriving.extents.write(target.memory.pool, number, body)
            assert np.array_equal(arriving.extents.read(target.memory.pool, number), sent)
    source.handovers.release(request_id)
    return arriving, msgspec.msgpack.decode(body.tobytes(), type=wire.Tail)


def step_until(engine: Engine, request_id: str, most: int = 3000) -> RequestOutput:
    """Steps until a request ends."""
    for _ in range(most):
        for output in engine.step():
            if output.request_id == request_id and output.finished:
                return output
    raise AssertionError("it does not end")


def apart(
    source: Engine, target: Engine, prompt: list[int], params: SamplingParams, lane: int = 0, **more: object
) -> RequestOutput:
    """A request whose prompt one engine reads and whose answer the other one gives."""
    source.add_request(prompt, params, lane=lane, request_id="r", handover=True, **more)
    first = step_until(source, "r")
    source.check_integrity()
    if "r" not in source.handovers.outbox:
        return first  # it ended with its first tokens
    arrived = cross(source, target, "r", params.n, lane)
    target.check_integrity()
    target.add_request(prompt, params, lane=lane, request_id="r", outputs=arrived[1].outputs, arrived=arrived, **more)
    result = step_until(target, "r")
    for engine in (source, target):
        engine.check_integrity()
        assert not engine.has_unfinished
        assert not engine.handovers.tables()
    for before, after in zip(first.outputs, result.outputs, strict=True):
        if before.finish_reason == "handover":
            assert after.token_ids[:1] == before.token_ids
            assert after.text.startswith(before.text)
    return result
