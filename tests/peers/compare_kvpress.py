"""What stays of a prompt, in kvfold and in kvpress, per layer and KV head of SmolLM2: `make test-peers`.

Both read the same 600 tokens of English in float32. What kvfold holds after the prompt is read from its pages: each
stored key is found again among the keys of kvpress's uncompressed cache, which says both which token it is and that
it is stored as it was computed. Plain `make test` does not collect this file: kvpress needs an environment of its own.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.config.engine import EngineConfig
from kvfold.engine.engine import Engine
from kvfold.engine.lane import build_lane
from kvfold.engine.params import SamplingParams
from kvfold.kv.access import read_blocks
from kvfold.kv.frame import Selected
from kvfold.kv.packing import decode
from kvfold.kv.pool import PagePool
from kvfold.kv.staged_tables import StagedTables
from kvfold.kv.tables import PageTables
from kvfold.methods.held import HeldRows
from kvfold.methods.registry import build_method
from kvfold.model.loading import LoadedModel, load_model

PYTHON = "KVFOLD_PEERS"
"""Variable with the interpreter of the environment that has kvpress; the Makefile sets it."""
TOKENS = 600
BUDGET = TOKENS // 2
SNAPKV = f"budget={BUDGET},window=32,recent=32,kernel=5,pool=avg,sinks=0"
NEAR = 1e-3
"""The largest distance of two float32 keys that are the same, and the largest share by which scores are equal."""


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    return load_model("smollm2-135m", dtype=torch.float32)


@pytest.fixture(scope="session")
def tokens(model: LoadedModel) -> list[int]:
    ids: list[int] = model.tokenizer(topics["objects"])["input_ids"]
    return ids[:TOKENS]


@pytest.fixture(scope="session")
def peer(model: LoadedModel, tokens: list[int], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensor]:
    """What `kvpress_choices.py` found."""
    folder = tmp_path_factory.mktemp("kvpress")
    prompt, result = folder / "tokens.json", folder / "choices.npz"
    prompt.write_text(json.dumps(tokens), "utf-8")
    script = Path(__file__).with_name("kvpress_choices.py")
    interpreter = os.environ.get(PYTHON)
    assert interpreter, f"{PYTHON} does not name an interpreter that has kvpress; use `make test-peers`"
    subprocess.run([interpreter, script, model.path, prompt, result], check=True)
    with np.load(result) as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


@dataclass
class Reader:
    """Reads the prompt with a method and tells what is held then."""

    model: LoadedModel
    tokens: list[int]
    keys: Tensor  # float32 [L, G, T, d], uncompressed

    def tables(self, method: str) -> tuple[PagePool, PageTables | StagedTables]:
        lane = build_lane(self.model.decoder, method, build_method(method), 32)
        # Several chunks: attention has to be added up over them.
        config = EngineConfig(2**27, chunk=256, max_batch_tokens=512, max_sequences=1, prefix_caching=False)
        engine = Engine(self.model.decoder, self.model.tokenizer, [lane], config)
        engine.add_request(self.tokens, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        while not engine.scheduler.running or engine.scheduler.running[0].computed < len(self.tokens):
            engine.step()
        return engine.memory.pool, engine.scheduler.running[0].held

    def kept(self, method: str, layers: int | None = None) -> Tensor:
        """Positions held after the prompt, bool [L, G, T], of all or the first `layers` layers."""
        pool, tables = self.tables(method)
        assert isinstance(tables, StagedTables)
        held = HeldRows(pool, tables)
        keys = self.keys[:layers]
        kept = torch.zeros(keys.shape[:3], dtype=torch.bool)
        for layer, heads in enumerate(keys):
            for head, rows in enumerate(held.rows(layer)[0]):
                distance, position = _nearest(rows[: held.counts[layer, head]], heads[head])
                assert distance.max() < NEAR
                assert (position.diff() > 0).all()
                kept[layer, head, position] = True
        return kept


@pytest.fixture(scope="session")
def reader(model: LoadedModel, tokens: list[int], peer: Mapping[str, Tensor]) -> Reader:
    return Reader(model, tokens, peer["keys"])


def _nearest(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to and index of the nearest of `keys` [T, d], for each of `rows` [n, d]."""
    found = torch.cdist(rows, keys, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return found.values, found.indices


def assert_same(kept: Tensor, expected: Tensor, scores: Tensor, *, by_layer: bool = False) -> None:
    """kept and expected, bool [L, G, T], differ only in tokens whose scores are those of the last one that stays, to
    rounding. by_layer: the heads of a layer share their budget."""
    cut = scores.masked_fill(~expected, float("inf")).amin((1, 2) if by_layer else 2, keepdim=True)
    tied = (scores - cut).abs() <= NEAR * cut.abs()
    assert torch.equal(kept.sum((1, 2)), expected.sum((1, 2)))
    assert bool(tied[kept ^ expected].all())


def assert_nested(kept: Tensor, other: Tensor) -> None:
    """Of each head's two choices one holds the other: they rank alike and differ in how many stay."""
    assert not bool(((kept & ~other).any(-1) & (other & ~kept).any(-1)).any())


def test_snapkv(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """No difference. kvpress averages over the window and a group's query heads after pooling, kvfold adds up before
    it: with mean pooling the order is the same. The published defaults differ (window 64 there, 32 here; kvfold keeps
    four sinks, too) and are set alike here."""
    assert_same(reader.kept(f"snapkv({SNAPKV})"), peer["snapkv.kept"], peer["snapkv.scores"])


def test_pyramidkv(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """One difference, in how `beta` is meant. kvpress lets the whole budget B fall from 2 B - B / beta to B / beta over
    the layers; kvfold, like the paper's code, only what the window w leaves of it, F = B - w, and adds w to every
    layer. The two lines are one where w + F / beta' = B / beta: beta = 10 there is beta' = F / (B / 10 - w) here. Then
    the layers get the same, to one token: kvpress rounds each, kvfold so that their sum is exact.

    kvpress gives all layers the same where B / beta is below the window; kvfold never does."""
    window = 8
    beta = (BUDGET - window) / (BUDGET / 10 - window)
    method = f"pyramidkv(budget={BUDGET},window={window},recent={window},kernel=5,pool=avg,sinks=0,beta={beta})"
    kept, expected = reader.kept(method), peer["pyramidkv.kept"]
    counts = kept.sum(-1)
    assert (counts - expected.sum(-1)).abs().max() <= 1
    assert counts[:, 0].sum() == BUDGET * len(counts)
    equal = counts == expected.sum(-1)
    assert_nested(kept[~equal], expected[~equal])
    assert_same(kept & equal[..., None], expected & equal[..., None], peer["pyramidkv.scores"])


def test_adakv(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """No difference without a safeguard (alpha = 0): the best G x B tokens of a layer stay. kvpress only masks the
    others, kvfold's pages no longer hold them. It pools by the mean, since it borrows SnapKV's scores; kvfold's
    default is Ada-KV's own maximum over 7 tokens."""
    kept = reader.kept(f"adakv({SNAPKV},alpha=0.0)")
    assert_same(kept, peer["adakv.kept"], peer["adakv.scores"], by_layer=True)


def test_adakv_with_a_safeguard(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """`alpha` is another thing in each. kvpress: a head keeps its best alpha x B tokens at least, and the layer's
    others go by score. kvfold and the paper: a head keeps (1 - alpha) x its share + alpha x B. So the counts differ,
    and of each head's two choices one holds the other; kvfold's counts follow from kvpress's shares at alpha = 0."""
    alpha = 0.6
    kept, expected = reader.kept(f"adakv({SNAPKV},alpha={alpha})"), peer["adakv_safeguard.kept"]
    assert expected.sum(-1).min() == int(alpha * BUDGET)
    assert_nested(kept, expected)
    shares = peer["adakv.kept"].sum(-1)
    assert (kept.sum(-1) - ((1 - alpha) * shares + alpha * BUDGET)).abs().max() <= 1
    assert (kept.sum((1, 2)) == kept.shape[1] * BUDGET).all()


def test_tova(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """No difference: the last query's attention, averaged over all heads of a layer; both keep the last token."""
    assert_same(reader.kept(f"tova(budget={BUDGET})"), peer["tova.kept"], peer["tova.scores"])


def test_h2o(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """Two differences from kvpress's observed attention, which is not H2O itself: kvpress divides what a token received
    by the number of queries that could see it, and ranks all tokens; H2O's paper and kvfold rank by the sum, and keep
    the newest half of the budget whatever it received. Both undone, the choice is the same."""
    sums = peer["h2o.scores"] * torch.arange(TOKENS, 0, -1)
    sums[..., -(BUDGET - BUDGET // 2) :] = torch.finfo(sums.dtype).max
    expected = torch.zeros_like(peer["h2o.kept"]).scatter(-1, sums.topk(BUDGET).indices, True)
    assert_same(reader.kept(f"h2o(budget={BUDGET})"), expected, sums)


def test_keydiff(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """No difference, once kvfold's sinks and recent tokens are not kept as such."""
    kept = reader.kept(f"keydiff(budget={BUDGET},sinks=0,recent=0)")
    assert_same(kept, peer["keydiff.kept"], peer["keydiff.scores"])


def test_keydiff_while_the_prompt_is_read(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """kvpress's `BlockPress` only plays that the prompt comes in blocks: all keys are those of an uncompressed prompt.
    kvfold's `batchmax` drops tokens before the next chunk is read, so later layers compute other keys. In the first
    layer keys depend on nothing that was dropped, and there the choice is the same."""
    method = f"batchmax(policy=keydiff,budget={BUDGET},sinks=0,recent=0,chunk=50)"
    assert torch.equal(reader.kept(method, layers=1), peer["keydiff_blocks.kept"][:1])


def test_expected_attention(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """No difference, once kvfold's recent tokens are not kept as such: in both the first four tokens stay, and neither
    their queries nor their keys count in what is expected of the others."""
    kept = reader.kept(f"expected(budget={BUDGET},sinks=4,recent=0,future=512)")
    assert_same(kept, peer["expected.kept"], peer["expected.scores"])


def test_streaming(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """kvpress cuts once, after the prompt, to `sinks` + window tokens, and then lets the cache grow; kvfold's window
    is the query's own position and those before it, in the prompt too. So the next query sees what kvpress keeps with
    a window of one more. Whole pages are held: up to a page of tokens that no query sees any more.

    Compared in the first layer, for the reason given for `batchmax`."""
    pool, tables = reader.tables(f"streaming(window={BUDGET - 4 + 1},sinks=4)")
    assert isinstance(tables, PageTables)
    layout = tables.layout
    for head, keys in enumerate(reader.keys[0]):
        held = torch.zeros(TOKENS, dtype=torch.bool)
        for pages, fmt in ((tables.near[head], layout.near), (tables.far[head], layout.far[0][head])):
            used = torch.from_numpy(pages[pages >= 0]).long()
            rows = decode(fmt, read_blocks(pool.data, fmt, used[None]))[0][0].T
            distance, position = _nearest(rows, keys)  # slots not yet written are near nothing
            held[position[distance < NEAR]] = True
        expected = peer["streaming.kept"][0, head]
        assert not bool((expected & ~held).any())
        assert int((held & ~expected).sum()) < layout.capacity[head]


def test_think(reader: Reader, peer: Mapping[str, Tensor]) -> None:
    """No difference in the channels. kvpress sets the others to zero, the newest tokens' too; kvfold does not store
    them, and stores the newest tokens whole. Both add up a group's query heads."""
    _, tables = reader.tables("think(keep=0.625)")
    assert isinstance(tables, StagedTables)
    basis = tables.bases[0]
    assert basis is not None
    assert isinstance(basis.key, Selected)
    kept = torch.zeros_like(peer["think.kept"]).scatter(-1, basis.key.index.long(), True)
    assert torch.equal(kept, peer["think.kept"])
