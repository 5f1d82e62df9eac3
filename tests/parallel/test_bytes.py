"""Bytes on the wire: those counted are those of the formulas, and those of the papers where nothing is compressed."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from kvfold.parallel.setting import CODES, LSE, NEAR, OUTPUTS, QUERIES
from kvfold.parallel.split import Split
from kvfold.parallel.traffic import prefill_bytes, uncompressed_bytes
from tests.engine.tiny import Tiny, tokens

from .ranks import Ranks
from .single import Single

GetTiny = Callable[[str], Tiny]


@pytest.mark.parametrize(
    ("count", "variant", "family", "method", "bits"),
    [
        (2, "ring", "llama", "zeroc(bits=3,recent=20)", 16),
        (3, "ring", "gemma3", "zeroc(bits=3,recent=20)", 16),
        (2, "ulysses", "llama", "zeroc(bits=3,recent=20)", 16),
        (3, "ulysses", "gpt2", "zeroc(bits=3,recent=20)", 6),
        (3, "ring", "llama", "none", 8),
        (2, "ulysses", "llama", "none", 8),
    ],
)
def test_counted_bytes_are_those_of_the_formulas(
    ranks: Ranks, tiny: GetTiny, count: int, variant: str, family: str, method: str, bits: int
) -> None:
    model = tiny(family)
    options = {"ranks": count, "variant": variant, "wire_bits": bits}
    with ranks.group(model.model, model.statistics, method, **options) as group:
        found = group.prefill(tokens(333, 5))
        sent = [+each.sent.bytes for each in group.usage()]
        split = Split.of(group.layout, group.variant, count, 333)
        assert sent == [+each for each in prefill_bytes(group._setting, split)]
        expected = Single(model.model, model.statistics, method).read(tokens(333, 5))
        assert (found - expected).abs().max() < (0.05 if bits == 16 else 0.5) * expected.std()


def test_uncompressed_caches_send_what_the_papers_send(ranks: Ranks, tiny: GetTiny) -> None:
    model = tiny("llama")
    spec = model.model.spec
    shape = (2, 200, spec.n_layers, spec.heads, spec.kv_heads, spec.head_dim, 4)
    sent: dict[str, Counter[str]] = {}
    for variant in ("ring", "ulysses"):
        with ranks.group(model.model, model.statistics, "none", variant=variant) as group:
            group.prefill(tokens(200, 5))
            sent[variant] = sum((each.sent.bytes for each in group.usage()), Counter())
    assert sent["ulysses"].total() - sent["ulysses"][LSE] == uncompressed_bytes("ulysses", *shape)
    # The newer half of what the rank with both ends has is seen by nobody else.
    assert sent["ring"].total() == uncompressed_bytes("ring", *shape) * 3 // 4


def test_what_is_sealed_costs_its_bits(ranks: Ranks, tiny: GetTiny) -> None:
    model = tiny("llama")
    spec = model.model.spec
    with ranks.group(model.model, model.statistics, "zeroc(bits=3,recent=20)", variant="ulysses") as group:
        group.prefill(tokens(333, 5))
        sent = sum((each.sent.bytes for each in group.usage()), Counter())
        layout = group.layout
    sealed = layout.far_tokens(333)
    blocks = [fmt.block_bytes / fmt.block for layer in layout.far for fmt in layer]
    kept = [(fmt.key.kept, fmt.value.kept) for layer in layout.far for fmt in layer]
    group_size = spec.heads // spec.kv_heads
    assert sent[CODES] <= sealed * sum(blocks) * 0.6  # half of them stay where they are
    assert sent[QUERIES] <= 333 * 0.6 * 4 * group_size * sum(k for k, _ in kept)
    assert sent[OUTPUTS] <= 333 * 0.6 * 4 * group_size * sum(v for _, v in kept)
    borrowed = 2 * spec.kv_heads * spec.head_dim * 4 * spec.n_layers
    assert sent[NEAR] <= (layout.sinks + layout.ring) * borrowed


def test_codes_come_out_as_they_went_in(ranks: Ranks, tiny: GetTiny) -> None:
    model = tiny("llama")
    for bits in (16, 8):
        with ranks.group(model.model, model.statistics, "zeroc(bits=3,recent=20)", ranks=1, wire_bits=bits) as group:
            formats = group._setting.formats(1, (1, 0))
            rows = torch.randn(5 * group.layout.seal, 2, 16) * 3
            blocks = formats.encode(rows, -rows)
            data = formats.pack(blocks)
            assert len(data) == formats.nbytes(5)
            for found, own in zip(formats.unpack(data), blocks, strict=True):
                assert torch.equal(found, own)
