"""Tiny random models, saved as transformers saves them, and plain attention to run them with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.model.decoder import Decoder, Lane
from kvfold.model.spec import ModelSpec

VOCAB = 99


def plain_attend(spec: ModelSpec) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Causal attention of one whole sequence, honouring each layer's window."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.shape[0])
        distance = position[:, None] - position
        mask = distance >= 0
        window = spec.layer_specs[layer].window
        if window is not None:
            mask &= distance < window
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(spec.group, dim=0) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=spec.attention_scale).transpose(0, 1)

    return attend


def run_plain(decoder: Decoder, ids: Tensor, **lane: Any) -> Tensor:
    """Logits [T, V] of one sequence."""
    fields = {"weights": decoder.projections, "attend": plain_attend(decoder.spec)} | lane
    hidden = decoder.forward(ids, torch.arange(len(ids)), [Lane(slice(0, len(ids)), **fields)])
    return decoder.logits(hidden)


def save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<end>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """save(config, **options of save_pretrained) -> (directory, the transformers model in float32).

    Every parameter is random, norms and biases too: left at one and zero they could be forgotten unnoticed.
    """
    from transformers import AutoModelForCausalLM

    def save(config: Any, **options: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
                else:
                    parameter.normal_(std=0.2)
        directory = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(directory, **options)
        save_tokenizer(directory)
        return directory, model

    return save


@pytest.fixture
def tiny_llama(save_model: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    """A Llama with 3 layers, 6 heads in groups of 3, untied: (directory, transformers model)."""
    return save_model(llama_config())


def llama_config(**more: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 56,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**(sizes | more))


@pytest.fixture
def token_ids() -> Tensor:
    """40 random token ids."""
    return torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run() -> Callable[..., Tensor]:
    """`run_plain`, as a fixture because test modules import nothing from each other."""
    return run_plain


@pytest.fixture
def attend_for() -> Callable[[ModelSpec], Callable[[int, Tensor, Tensor, Tensor], Tensor]]:
    """`plain_attend`."""
    return plain_attend


@pytest.fixture
def make_llama_config() -> Callable[..., Any]:
    """`llama_config`."""
    return llama_config
