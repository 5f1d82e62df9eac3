"""Tiny random models of several families, and engines over them that run in float32 throughout."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.calibration.capture import Capture
from kvfold.calibration.statistics import zeroc_statistics
from kvfold.config.engine import EngineConfig
from kvfold.engine.engine import Engine
from kvfold.engine.lane import build_lane, pack_lanes
from kvfold.engine.outputs import RequestOutput
from kvfold.engine.params import SamplingParams
from kvfold.methods.registry import build_method
from kvfold.model.decoder import Decoder
from kvfold.model.loading import LoadedModel, load_model

VOCAB = 128
POSITIONS = 640
STEPS = 3000  # of the engine; a test that needs more is stuck

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def config(family: str) -> Any:
    """llama: groups of 2; qwen2: biases; gemma3: a window of 40 in the first layer; gpt2: no RoPE;
    mqa: one KV head."""
    import transformers as hf

    if family == "gpt2":
        ids = {"eos_token_id": None, "bos_token_id": None}
        return hf.GPT2Config(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=64, n_layer=2, n_head=4, **ids)
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        own = {"sliding_window": 40, "layer_types": kinds, "query_pre_attn_scalar": 16}
        return hf.Gemma3TextConfig(**SIZES, **own)
    if family == "mqa":
        return hf.LlamaConfig(**{**SIZES, "num_key_value_heads": 1})
    return {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}[family](**SIZES)


@dataclass(frozen=True)
class Tiny:
    """A loaded model, the same one in transformers, and its ZeroC statistics from a real calibration."""

    model: LoadedModel
    reference: Any
    statistics: Mapping[str, Tensor]

    @classmethod
    def make(cls, family: str, directory: Path) -> "Tiny":
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(0)
            reference = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in reference.parameters():
                    # Norms and biases too: left at one and zero they could be forgotten unnoticed.
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter), alpha=0.2)
                    else:
                        parameter.normal_(std=0.2)
        reference.save_pretrained(directory)
        save_tokenizer(directory)
        model = load_model(directory, dtype=torch.float32)
        capture = Capture(model.decoder, 1024, 2)
        for seed in (101, 102):
            capture.run(torch.tensor(tokens(512, seed)))
        return cls(model, reference, zeroc_statistics(model.decoder, capture))

    def engine(self, *methods: str, kv_memory: int = 2**23, **options: Any) -> Engine:
        """An engine with one lane per method; `options` are EngineConfig's."""
        lanes = [build_lane(self.model.decoder, m, build_method(m), 32, self.statistics) for m in methods]
        return Engine(self.model.decoder, self.model.tokenizer, lanes, EngineConfig(kv_memory, **options))

    def packed_engine(self, bits: int, *methods: str, kv_memory: int = 2**23, **options: Any) -> Engine:
        """The same with packed weights."""
        decoder = Decoder(self.model.spec, self.model.decoder.weights)
        lanes = [build_lane(decoder, m, build_method(m), 32, self.statistics) for m in methods]
        packed = pack_lanes(decoder, lanes, bits)
        return Engine(decoder, self.model.tokenizer, packed, EngineConfig(kv_memory, **options))

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """transformers' log-probability of each token but the first, float32 [T - 1]."""
        with torch.no_grad():
            logits = self.reference(torch.tensor([ids])).logits[0].float()
        return logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def save_tokenizer(directory: Path) -> None:
    """One word per token, w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def tokens(count: int, seed: int) -> list[int]:
    """Random token ids."""
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **more)


def run(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    lanes: Sequence[int] | None = None,
    each_step: Callable[[], None] = lambda: None,
) -> list[RequestOutput]:
    """Runs requests as one batch, in order; `each_step` is called after every step of the engine."""
    several = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ids = [
        engine.add_request(prompt, own, lane=lane)
        for prompt, own, lane in zip(prompts, several, lanes or [0] * len(prompts), strict=True)
    ]
    done: dict[str, RequestOutput] = {}
    for _ in range(STEPS):
        if not engine.has_unfinished:
            return [done[i] for i in ids]
        done |= {output.request_id: output for output in engine.step()}
        each_step()
    raise AssertionError(f"not finished after {STEPS} steps")


def generated(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    """Token ids of every completion of every request."""
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def prompt_logprobs(engine: Engine, prompts: Sequence[list[int]], lane: int = 0) -> list[Tensor]:
    """Log-probability of each prompt token but the first, through the engine, float32 [T - 1] each."""
    outputs = run(engine, prompts, greedy(1, prompt_logprobs=0), lanes=[lane] * len(prompts))
    return [
        torch.tensor(
            [entry[token].logprob for token, entry in zip(prompt, o.prompt_logprobs or [], strict=True) if entry]
        )
        for prompt, o in zip(prompts, outputs, strict=True)
    ]


def assert_same_but_for_rounding(found: Tensor, expected: Tensor) -> None:
    """Sums in another order give numbers that differ in their last bits.

    A coded element that lies on the border of two levels may then fall to the other side, which moves the tokens
    that attend to it visibly: a few of them may, most must not.
    """
    difference = (found - expected).abs()
    assert difference.max() < 0.05, difference.max()
    assert difference.quantile(0.9) < 1e-3, difference.quantile(0.9)
