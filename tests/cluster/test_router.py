"""P workers answer as one, whatever happens to them."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from kvfold.engine.params import SamplingParams
from kvfold.server.messages import Add, Rejected, SetRoles
from tests.cluster.local import Cluster, FaultyTransport, cluster
from tests.engine.tiny import Tiny, generated, greedy, run, tokens

GetTiny = Callable[[str], Tiny]
METHODS = ("none", "zeroc(bits=4,recent=16)", "h2o(budget=60)", "zipcache(recent=16)")
SCHEDULES = 200


def sampled(seed: int, max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(n=n, temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)


def expected(made: Tiny, adds: list[Add]) -> list[list[list[int]]]:
    engine = made.engine(*METHODS)
    outputs = run(engine, [a.prompt_token_ids for a in adds], [a.params for a in adds], lanes=[a.lane for a in adds])
    return generated(outputs)


def requests(rng: random.Random, count: int, start: str = "") -> list[Add]:
    return [
        Add(
            f"{start}{i}",
            tokens(rng.choice([1, 30, 90, 170]), rng.randrange(6)),
            sampled(rng.randrange(4), rng.choice([1, 2, 15, 30]), rng.choice([1, 1, 3])),
            rng.randrange(len(METHODS)),
        )
        for i in range(count)
    ]


def together(made: Tiny, body: Callable[[Cluster], Any], **options: Any) -> None:
    async def go() -> None:
        async with cluster(lambda: made.engine(*METHODS, chunk=64), **options) as running:
            await body(running)
            await running.check_nothing_is_left()

    asyncio.run(go())


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 3), (0, 2)])
def test_workers_answer_as_one_engine(tiny: GetTiny, prefill: int, decode: int) -> None:
    made = tiny("llama")
    adds = requests(random.Random(prefill), 24)
    wanted = expected(made, adds)

    async def body(running: Cluster) -> None:
        found = await asyncio.gather(*(running.ask(add) for add in adds))
        assert found == wanted
        moved = sum(m.fetched for m in running.router.members)
        assert bool(moved) == bool(prefill)
        assert all(m.fetched == 0 for m in running.router.members if m.role == "prefill")

    together(made, body, prefill=prefill, decode=decode)


def test_small_memories_hold_requests_back_and_lose_none(tiny: GetTiny) -> None:
    made = tiny("llama")
    probe = made.engine(*METHODS)
    memory = 2 * probe.memory.pages(0, 220) * probe.memory.pool.page_bytes
    adds = requests(random.Random(5), 20)
    wanted = expected(made, adds)

    async def go() -> None:
        async with cluster(lambda: made.engine(*METHODS, kv_memory=memory, chunk=64)) as running:
            assert await asyncio.gather(*(running.ask(add) for add in adds)) == wanted
            await running.check_nothing_is_left()

    asyncio.run(go())


def test_cancelled_requests_leave_nothing(tiny: GetTiny) -> None:
    rng = random.Random(1)
    adds = [Add(f"{i}", tokens(170, i), greedy(200), i % len(METHODS)) for i in range(12)]

    async def body(running: Cluster) -> None:
        asked = [asyncio.create_task(running.ask(add)) for add in adds]
        for add, task in zip(adds, asked, strict=True):
            await asyncio.sleep(rng.random() * 0.1)
            task.cancel()
            running.cancel(add.id)

    together(tiny("llama"), body)


def test_killed_workers_and_lost_caches_change_no_answer(tiny: GetTiny) -> None:
    """200 schedules of kills and faults from one seed: right tokens, no page left anywhere."""
    made = tiny("llama")
    rng = random.Random(2024)
    FaultyTransport.random = rng
    pool = requests(rng, 40)
    wanted = expected(made, pool)

    async def schedule(running: Cluster, number: int) -> None:
        FaultyTransport.faults = rng.choice([0.0, 0.0, 0.3])
        chosen = rng.sample(range(len(pool)), 3)
        adds = [Add(f"{number}-{i}", pool[i].prompt_token_ids, pool[i].params, pool[i].lane) for i in chosen]
        asked = [asyncio.create_task(running.ask(add)) for add in adds]
        for _ in range(rng.choice([0, 1, 1, 2])):
            await asyncio.sleep(rng.random() * 0.15)
            worker = running.workers[rng.choice(list(running.workers))]
            if not worker.dead:
                worker.kill()
        for i, found in zip(chosen, await asyncio.gather(*asked), strict=True):
            assert found == wanted[i], (number, found)

    async def body(running: Cluster) -> None:
        for number in range(SCHEDULES):
            await schedule(running, number)
            if number % 20 == 0:
                await running.check_nothing_is_left()
        assert sum(m.restarts for m in running.router.members) > 50
        assert sum(m.lost for m in running.router.members) > 10

    together(made, body, prefill=2, decode=2, transport=FaultyTransport, attempts=6)


def test_a_request_that_is_lost_again_and_again_gets_a_clean_error(tiny: GetTiny) -> None:
    async def body(running: Cluster) -> None:
        FaultyTransport.faults = 1.0
        try:
            answer = await running.ask(Add("r", tokens(60, 1), greedy(20), 0))
        finally:
            FaultyTransport.faults = 0.0
        assert isinstance(answer, Rejected)
        assert answer.error == "EngineDiedError"
        assert "lost 3 times" in answer.message
        assert await running.ask(Add("s", tokens(60, 1), greedy(20), 0)) is not None

    together(tiny("llama"), body, transport=FaultyTransport, attempts=2)


def test_an_answer_of_one_token_is_read_once(tiny: GetTiny) -> None:
    """Even where the other worker, which asked for its cache in vain, is heard before the one that has the answer."""
    made = tiny("llama")
    prompt = tokens(90, 3)
    [[[first, *_]]] = generated(run(made.engine("none"), [prompt], greedy(2)))
    stopping = SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=[first])

    async def body(running: Cluster) -> None:
        engines = [worker.engine for worker in running.workers.values()]
        for engine in engines:
            step = engine.step
            engine.step = lambda step=step: (step(), time.sleep(0.2))[0]  # type: ignore[method-assign]
        for number, params in enumerate((stopping, greedy(1))):
            assert await running.ask(Add(f"{number}", prompt, params, 0)) == [[first]]
            assert sum(engine.prompt_tokens for engine in engines) <= (number + 1) * len(prompt)
        assert sum(member.lost for member in running.router.members) <= 1

    together(made, body)


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (0, 2)])
def test_a_prompt_goes_where_its_beginning_is_known(tiny: GetTiny, prefill: int, decode: int) -> None:
    made = tiny("llama")
    prompt = tokens(600, 1)

    async def body(running: Cluster) -> None:
        await running.ask(Add("a", prompt[:560], greedy(2), 0))
        await running.ask(Add("b", tokens(560, 2), greedy(2), 0))
        reading = "prefill" if prefill else "decode"
        readers = [running.workers[m.name] for m in running.router.members if m.role == reading]
        assert [w.engine.stats().prefix_hit_tokens for w in readers] == [0, 0]
        for number in range(3):
            await running.ask(Add(f"c{number}", prompt, greedy(2), 0))
        hits = sorted(w.engine.stats().prefix_hit_tokens for w in readers)
        assert hits[0] == 0
        assert hits[1] >= 3 * 512

    together(made, body, prefill=prefill, decode=decode)


def test_roles_change_while_requests_run(tiny: GetTiny) -> None:
    made = tiny("llama")
    adds = requests(random.Random(9), 30)
    wanted = expected(made, adds)

    async def body(running: Cluster) -> None:
        asked = [asyncio.create_task(running.ask(add)) for add in adds]
        for prefill in (3, 0, 1, 2):
            await asyncio.sleep(0.1)
            running.router.handle(SetRoles(prefill, 4 - prefill))
            roles = [m.role for m in running.router.members]
            assert (roles.count("prefill"), roles.count("decode")) == (prefill, 4 - prefill)
        assert await asyncio.gather(*asked) == wanted

    together(made, body, prefill=2, decode=2)
