"""The engine's tiny models, and one with any number of heads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvfold.model.loading import load_model
from tests.engine.conftest import tiny
from tests.engine.tiny import SIZES, Tiny, save_tokenizer

__all__ = ["grouped", "tiny"]


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Tiny]:
    """`grouped(heads, kv_heads)`: a random Llama with so many, not calibrated."""
    made: dict[tuple[int, int], Tiny] = {}

    def get(heads: int, kv_heads: int) -> Tiny:
        if (heads, kv_heads) not in made:
            made[heads, kv_heads] = _llama(heads, kv_heads, tmp_path_factory.mktemp(f"llama-{heads}-{kv_heads}"))
        return made[heads, kv_heads]

    return get


def _llama(heads: int, kv_heads: int, directory: Path) -> Tiny:
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    with torch.random.fork_rng():
        torch.manual_seed(heads)
        reference = LlamaForCausalLM(LlamaConfig(**SIZES | own)).float().eval()
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
    reference.save_pretrained(directory)
    save_tokenizer(directory)
    return Tiny(load_model(directory, dtype=torch.float32), reference, {})
