"""However a staged request is computed, the result is the same: chunks, batches, preemption, forks, other lanes."""

from collections.abc import Callable

import pytest
import torch

from kvfold.engine.engine import Engine
from kvfold.engine.outputs import RequestOutput
from kvfold.engine.params import SamplingParams
from tests.engine.tiny import Tiny, assert_same_but_for_rounding, greedy, run, tokens

GetTiny = Callable[[str], Tiny]
METHODS = [
    "snapkv(budget=60)", "pyramidkv(budget=60)", "adakv(budget=60)", "kvcompress(budget=96)", "h2o(budget=60)",
    "tova(budget=60)", "expected(budget=60)", "keydiff(budget=60)", "ems(budget=60)", "dbudgetkv(threshold=0.1)",
    'batchmax(policy="adakv",budget=60,chunk=50)', 'batchmax(policy="h2o",budget=60,chunk=50)+int8(recent=16)',
    "staged+kivi(bits=4,recent=16,group=16)", "h2o(budget=60)+hack(bits=8,recent=16,partition=16)",
    "snapkv(budget=60)+think(recent=16)", "zipcache(hi=8,lo=4,recent=16,every=32)",
    "adakv(budget=60)+zeroc(bits=6,recent=16)", "zeroc(bits=4,salient_bits=8,recent=16)",
    "keydiff(budget=60)+decoquant(bits=8,recent=16)",
]  # fmt: skip
FEW = [METHODS[i] for i in (2, 3, 8, 11, 15)]
PROMPTS = [tokens(length, seed) for seed, length in enumerate((130, 37, 171))]
NEW = 40


def logprobs(output: RequestOutput) -> list[torch.Tensor]:
    """Of the chosen tokens: they tell more than the tokens."""
    return [
        torch.tensor([entry[t].logprob for t, entry in zip(c.token_ids, c.logprobs or [], strict=True)])
        for c in output.outputs
    ]


def read(engine: Engine, prompts: list[list[int]], lanes: list[int] | None = None) -> list[RequestOutput]:
    outputs = run(engine, prompts, greedy(NEW, logprobs=0), lanes=lanes)
    engine.check_integrity()
    return outputs


def same(found: RequestOutput, expected: RequestOutput) -> None:
    """Where two tokens are equally likely, rounding may choose either; what follows them is then not compared."""
    pairs = zip(found.outputs, expected.outputs, logprobs(found), logprobs(expected), strict=True)
    for one, other, chosen, wanted in pairs:
        assert one.finish_reason == other.finish_reason
        differ = (i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if a != b)
        end = next(differ, len(wanted)) + 1
        assert (chosen[end - 1 : end] - wanted[end - 1 : end]).abs().sum() < 1e-3
        assert_same_but_for_rounding(chosen[:end], wanted[:end])


@pytest.fixture(scope="module")
def alone(tiny: GetTiny) -> Callable[[str, str, int], RequestOutput]:
    """Each prompt read by an engine of its own, in one piece."""
    known: dict[tuple[str, str, int], RequestOutput] = {}

    def get(family: str, method: str, index: int) -> RequestOutput:
        key = family, method, index
        if key not in known:
            [known[key]] = read(tiny(family).engine(method, prefix_caching=False, chunk=512), [PROMPTS[index]])
        return known[key]

    return get


Alone = Callable[[str, str, int], RequestOutput]


@pytest.mark.parametrize("method", METHODS)
def test_chunks_and_company_change_nothing(tiny: GetTiny, alone: Alone, method: str) -> None:
    """Chunks of 23 tokens, three requests at once, none of which starts where another does."""
    engine = tiny("llama").engine(method, prefix_caching=False, chunk=23, max_batch_tokens=40)
    for index, output in enumerate(read(engine, PROMPTS)):
        same(output, alone("llama", method, index))


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
@pytest.mark.parametrize("method", FEW)
def test_the_same_with_windows_and_without_rope(tiny: GetTiny, alone: Alone, family: str, method: str) -> None:
    engine = tiny(family).engine(method, prefix_caching=False, chunk=31, max_batch_tokens=40)
    for index, output in enumerate(read(engine, PROMPTS[:2])):
        same(output, alone(family, method, index))


@pytest.mark.parametrize("method", FEW)
def test_preemption_changes_nothing(tiny: GetTiny, alone: Alone, method: str) -> None:
    """In the middle of a prompt, before and after an event, the youngest request loses all it holds."""
    engine = tiny("llama").engine(method, prefix_caching=False, chunk=40)
    steps = 0

    def preempt() -> None:
        nonlocal steps
        steps += 1
        if steps in (2, 6, 40) and engine.scheduler.running:
            engine.scheduler._preempt(engine.scheduler.running[-1])
        engine.check_integrity()

    outputs = run(engine, PROMPTS[:2], greedy(NEW, logprobs=0), each_step=preempt)
    assert engine.scheduler.preemptions == 3
    for index, output in enumerate(outputs):
        same(output, alone("llama", method, index))


def test_other_lanes_change_nothing(tiny: GetTiny, alone: Alone) -> None:
    """Several methods and a cache without events in one engine: what one watches or records disturbs no other."""
    methods = [m for m in METHODS if m.startswith(("snap", "ems", "expected", "zip", "keydiff"))]
    engine = tiny("llama").engine(*methods, "none", prefix_caching=False, chunk=64)
    lanes = list(range(len(methods)))
    outputs = read(engine, [PROMPTS[0]] * len(lanes) + [PROMPTS[1]], [*lanes, len(methods)])
    for method, output in zip(methods, outputs[:-1], strict=True):
        same(output, alone("llama", method, 0))


@pytest.mark.parametrize("method", FEW)
def test_three_answers_are_three_requests(tiny: GetTiny, method: str) -> None:
    """They share the compressed prompt, and then each goes its own way through events of its own."""
    prompt, model = PROMPTS[0], tiny("llama")
    engine = model.engine(method, prefix_caching=False, seed=3)
    sampling = SamplingParams(max_tokens=40, n=3, temperature=1.0, seed=7, ignore_eos=True, logprobs=0)
    [output] = run(engine, [prompt], sampling, each_step=engine.check_integrity)
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3
    for completion in output.outputs:
        # A request that is made to give the same tokens must find them as likely.
        other = model.engine(method, prefix_caching=False)
        found = forced(other, prompt, completion.token_ids)
        expected = torch.tensor(
            [entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs or [], strict=True)]
        )
        assert_same_but_for_rounding(found, expected)
    assert engine.memory.pool.bytes_in_use == 0


def forced(engine: Engine, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities of given tokens as an answer: the events are those of generating."""
    biases = iter(answer)
    found = []
    sample = engine._sampler.sample

    def fixed(logits: torch.Tensor, rows: list[object]) -> object:
        token = next(biases)
        found.append(logits[0].log_softmax(-1)[token])
        forced_logits = torch.full_like(logits, -1e9)
        forced_logits[0, token] = 0
        return sample(forced_logits, rows)  # type: ignore[arg-type]

    engine._sampler.sample = fixed  # type: ignore[assignment, method-assign]
    run(engine, [prompt], greedy(len(answer)))
    return torch.stack(found)
