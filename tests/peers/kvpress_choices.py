"""What kvpress keeps of one prompt: runs in an environment of its own, knows nothing of kvfold, writes an .npz file.

    python kvpress_choices.py MODEL_DIRECTORY TOKENS.json CHOICES.npz

TOKENS.json: a list of T token ids. The file has `keys`, float32 [L, G, T, d], as the uncompressed cache holds them
(after RoPE), and for each name in `presses`: `NAME.kept`, bool [L, G, T] (think: [L, G, d]), and where the method ranks
tokens `NAME.scores`, float32 [L, G, T].
"""

import json
import sys
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

HALF = 0.5  # compression ratio: half of the tokens go


def presses() -> dict[str, Any]:
    """By the name of the method in kvfold."""
    snapkv = {"window_size": 32, "kernel_size": 5}
    return {
        "snapkv": kvpress.SnapKVPress(HALF, **snapkv),
        # The least that a layer gets (1/10 of the budget) must hold the window, or kvpress gives all layers the same.
        "pyramidkv": kvpress.PyramidKVPress(HALF, window_size=8, kernel_size=5, beta=10),
        "adakv": kvpress.AdaKVPress(kvpress.SnapKVPress(HALF, **snapkv), alpha_safeguard=0.0),
        "adakv_safeguard": kvpress.AdaKVPress(kvpress.SnapKVPress(HALF, **snapkv), alpha_safeguard=0.6),
        "tova": kvpress.TOVAPress(HALF),
        "h2o": kvpress.ObservedAttentionPress(HALF),
        "keydiff": kvpress.KeyDiffPress(HALF),
        "keydiff_blocks": kvpress.BlockPress(kvpress.KeyDiffPress(HALF), block_size=50),
        "expected": kvpress.ExpectedAttentionPress(HALF, n_future_positions=512, n_sink=4),
        "streaming": kvpress.StreamingLLMPress(HALF, n_sink=4),
        "think": kvpress.ThinKPress(0.375, window_size=32),
    }


class Recorder:
    """Wraps `compress` of a press, which every layer calls once with its whole cache."""

    def __init__(self, press: Any) -> None:
        self.keys: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.scores: list[Tensor] = []
        self._compress = press.compress
        press.compress = self.compress
        ranking = getattr(press, "press", press)
        if isinstance(ranking, kvpress.ScorerPress) and not isinstance(press, kvpress.BlockPress):
            self._score = ranking.score
            ranking.score = self.score

    def score(self, *args: Any) -> Tensor:
        scores = self._score(*args)
        self.scores.append(scores[0].clone())  # AdaKV writes into it
        return scores

    def compress(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Any:
        before = keys.clone()
        found, others = self._compress(module, hidden_states, keys, values, *rest)
        self.keys.append(before[0])
        self.kept.append(self._kept(module, before, found)[0])
        return found, others

    @staticmethod
    def _kept(module: Any, before: Tensor, after: Tensor) -> Tensor:
        if after.shape != before.shape:  # tokens are gone: which of the rows are left?
            return (before[:, :, :, None] == after[:, :, None]).all(-1).any(-1)
        masked = getattr(module, "masked_key_indices", None)
        if masked is None:  # channels are zero
            return (after != 0).any(2)
        kept = torch.ones(before.shape[:3], dtype=torch.bool)
        kept[masked] = False
        return kept


def run(model: Any, tokens: Tensor, press: Any) -> Recorder:
    recorder = Recorder(press)
    with torch.inference_mode(), press(model):
        model.model(tokens, past_key_values=DynamicCache(), use_cache=True)
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return recorder


def main(directory: str, tokens_file: str, result: str) -> None:
    tokens = torch.tensor([json.loads(Path(tokens_file).read_text("utf-8"))])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found: dict[str, Any] = {}
    for name, press in presses().items():
        # Only eager attention returns weights; with it AdaKV refuses, and SnapKV and TOVA take another way.
        model.set_attn_implementation("eager" if name == "h2o" else "sdpa")
        recorder = run(model, tokens, press)
        found[f"{name}.kept"] = torch.stack(recorder.kept).numpy()
        if recorder.scores:
            found[f"{name}.scores"] = torch.stack(recorder.scores).numpy()
        found.setdefault("keys", torch.stack(recorder.keys).numpy())
    np.savez(result, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
