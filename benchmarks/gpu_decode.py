"""Decoding speed of a whole model with random weights and a fixed KV memory, for `gpu.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_cases import Held, Shape, layout_of, seconds, summary
from torch import Tensor

from kvfold.attention.base import Plan
from kvfold.attention.triton.backend import TritonBackend
from kvfold.attention.triton.graph import DecodeGraphs
from kvfold.methods.base import AttentionWeights
from kvfold.model.blocks import DecoderWeights, LayerWeights, Mlp
from kvfold.model.decoder import Decoder, Lane
from kvfold.model.elementwise import Gate, Norm
from kvfold.model.linear import Projections, TorchLinear
from kvfold.model.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec


@dataclass(frozen=True)
class Size:
    """Of a Llama-3-8B."""

    shape: Shape = field(default_factory=Shape)
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    vocab: int = 128256


def random_decoder(size: Size, device: torch.device) -> Decoder:
    shape = size.shape
    rope = RopeSpec(tuple(500000.0 ** (-i / (shape.head_dim // 2)) for i in range(shape.head_dim // 2)))
    spec = ModelSpec(
        "llama", size.hidden, shape.heads, shape.kv_heads, shape.head_dim, size.intermediate, size.vocab, 2**20,
        shape.head_dim**-0.5, (LayerSpec(None, rope),) * size.layers, NormSpec("rms", 1e-5), "silu",
    )  # fmt: skip

    def weight(rows: int, columns: int) -> Tensor:
        x = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return x.normal_(std=columns**-0.5)

    def norm() -> Norm:
        return Norm("rms", torch.ones(size.hidden, dtype=torch.bfloat16, device=device), None, 1e-5)

    def layer() -> tuple[AttentionWeights, LayerWeights]:
        heads = shape.heads + 2 * shape.kv_heads
        attention = AttentionWeights(
            weight(heads * shape.head_dim, size.hidden), None, weight(size.hidden, shape.heads * shape.head_dim), None
        )
        up, down = weight(2 * size.intermediate, size.hidden), weight(size.hidden, size.intermediate)
        mlp = Mlp(TorchLinear(up), Gate("silu", True), TorchLinear(down))
        return attention, LayerWeights(norm(), norm(), mlp, None, None, None)

    attention, layers = zip(*(layer() for _ in range(size.layers)), strict=True)
    embedding, head = weight(size.vocab, size.hidden), TorchLinear(weight(size.vocab, size.hidden))
    return Decoder(spec, DecoderWeights(embedding, None, attention, layers, norm(), head))


def with_maps(decoder: Decoder, shape: Shape) -> list[Projections]:
    """The weights with what ZeroC adds to a model with RoPE: one product per new key and query."""
    device, dtype, d = decoder.device, decoder.dtype, shape.head_dim
    weights = []
    for own in decoder.projections:
        q, _ = torch.linalg.qr(torch.randn(shape.kv_heads, d, d, device=device))
        maps = q.to(dtype)
        shift = torch.zeros(shape.kv_heads, d, dtype=dtype, device=device)
        weights.append(Projections(own.qkv, own.out, maps, maps, shift))
    return weights


def whole_model(
    backend: TritonBackend,
    size: Size,
    memory: int,
    contexts: Sequence[int],
    most: int,
    device: torch.device,
    repetitions: int,
) -> list[dict[str, Any]]:
    """Tokens per second of as many sequences as fit into `memory` bytes of KV pages, `most` at most."""
    decoder = random_decoder(size, device)
    rows: list[dict[str, Any]] = []
    for context in contexts:
        for name in ("dense", "8", "4", "3", "2"):
            row: dict[str, Any] = {"format": name, "context": context, "kv_memory": memory}
            layout = layout_of(name, size.shape, size.layers)
            batch = min(most, memory // (layout.most_pages(context + 64, context + 64) * layout.page_bytes))
            if not batch:
                rows.append(row | {"batch": 0, "error": "not one sequence fits"})
                continue
            try:
                rows.append(row | {"batch": batch} | _steps(backend, decoder, size, name, context, batch, repetitions))
            except Exception as error:  # the other rows are still worth having
                rows.append(row | {"batch": batch, "error": f"{type(error).__name__}: {error}"[:300]})
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


@torch.inference_mode()
def _steps(
    backend: TritonBackend, decoder: Decoder, size: Size, name: str, context: int, batch: int, repetitions: int
) -> dict[str, Any]:
    device = decoder.device
    held = Held(layout_of(name, size.shape, size.layers), batch, context, device)
    weights = decoder.projections if name == "dense" else with_maps(decoder, size.shape)

    def forward(token_ids: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return plan.attend(layer, q, k, v)[0]

        hidden = decoder.forward(token_ids, positions, [Lane(slice(0, len(token_ids)), weights, attend)])
        return decoder.logits(hidden).argmax(-1)

    graphs = DecodeGraphs(backend, held.pool, held.layout, size.shape.head_dim**-0.5, forward)
    tokens = torch.zeros(batch, dtype=torch.int64, device=device)

    def step() -> None:
        nonlocal tokens
        steps = held.steps()
        positions = torch.tensor([s.tables.length for s in steps])
        tokens = graphs.run(steps, tokens, positions)
        for tables in held.tables:
            tables.advance(held.pool, tables.length + 1)

    times = summary(seconds(step, device, repetitions))
    return times | {"tokens_per_s": batch / times["median_s"], "kv_bytes": held.nbytes}
