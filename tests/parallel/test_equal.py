"""Several ranks give what one worker gives: logits, pages, and the tokens that follow."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvfold.parallel.group import SequenceParallel
from tests.engine.tiny import Tiny, tokens

from .ranks import Ranks
from .single import Single

GetTiny = Callable[[str], Tiny]

CASES = [
    (2, "ring", "llama", "none", 190),
    (2, "ring", "llama", "zeroc(bits=4)", 301),
    (2, "ring", "gpt2", "zeroc(bits=3,recent=20)", 150),
    (2, "ring", "gemma3", "zeroc(bits=3,recent=20)", 257),
    (2, "ring", "mqa", "zeroc(bits=3,recent=20)", 150),
    (2, "ring", "llama", "zeroc(rank=8,recent=16)", 120),
    (2, "ring", "llama", "kivi(bits=4,recent=32)", 200),
    (2, "ring", "llama", "hack(bits=4,recent=16)", 230),
    (2, "ring", "llama", "int8(recent=16)+streaming(window=64)", 190),
    (2, "ring", "llama", "zeroc(bits=4)", 1),
    (2, "ulysses", "llama", "none", 101),
    (2, "ulysses", "llama", "zeroc(bits=2,recent=20)", 333),
    (2, "ulysses", "gemma3", "zeroc(bits=3,recent=20)", 190),
    (2, "ulysses", "llama", "int8(recent=16)+streaming(window=64)", 190),
    (2, "ulysses", "llama", "zeroc(bits=4,recent=16)", 37),
    (3, "ring", "llama", "zeroc(bits=2,recent=20)", 333),
    (3, "ring", "gemma3", "none", 190),
    (3, "ring", "llama", "kivi(bits=4,recent=32)", 260),
    (3, "ring", "llama", "none", 2),
    (3, "ulysses", "gpt2", "zeroc(bits=3,recent=20)", 200),
]


@pytest.mark.parametrize(("count", "variant", "family", "method", "length"), CASES)
def test_ranks_give_what_one_worker_gives(
    ranks: Ranks, tiny: GetTiny, count: int, variant: str, family: str, method: str, length: int
) -> None:
    model = tiny(family)
    single = Single(model.model, model.statistics, method)
    prompt = tokens(length, length)
    expected = single.read(prompt)
    with ranks.group(model.model, model.statistics, method, ranks=count, variant=variant) as group:
        found = group.prefill(prompt, room=20)
        near(found, expected)
        assert group._sequence is not None
        if "none" not in method and "rank" not in method:
            assert_same_codes(group, single)
        for _ in range(20):
            token = int(expected.argmax())
            expected = single.read([token])
            found = group.decode(token)
            near(found, expected)
    assert ranks.reports == ["fine"] * (count - 1)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To rounding; where a code on the border of two levels falls to the other side, a little more."""
    assert (found - expected).abs().max() < 0.05 * expected.std()


def test_a_group_serves_one_prompt_after_the_other(ranks: Ranks, tiny: GetTiny) -> None:
    model = tiny("llama")
    with ranks.group(model.model, model.statistics, "zeroc(bits=3,recent=20)") as group:
        first = group.prefill(tokens(90, 1))
        group.prefill(tokens(211, 2))
        for token in tokens(70, 3):  # more orders than are kept in the store
            group.decode(token)
        assert torch.equal(group.prefill(tokens(90, 1)), first)
    assert ranks.reports == ["fine"]


def assert_same_codes(group: SequenceParallel, single: Single) -> None:
    """Nearly all: sums in another order move a few numbers across the border of two levels."""
    assert group._sequence is not None
    shard, layout = group._sequence.shard, group.layout
    for layer, window in enumerate(layout.windows):
        formats = group._setting.formats(layer, group._heads[0])
        ends = layout.sinks + (shard.units + 1) * layout.seal
        live = np.ones(len(ends), bool) if window is None else ends > group._sequence.length - window + 1
        for (fmt, places), own in zip(formats.groups, shard.read(formats), strict=True):
            for place, blocks in zip(places.tolist(), own, strict=True):
                per_unit = layout.seal // fmt.block
                theirs = single.blocks(layer, formats.heads[place]).unflatten(0, (-1, per_unit))[shard.units[live]]
                same = blocks.unflatten(0, (-1, per_unit))[torch.from_numpy(live)] == theirs
                assert not live.any() or same.float().mean() > 0.97
