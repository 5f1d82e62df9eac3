"""How an answer is predicted, token by token, and how far that is from what the dense cache predicts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Likelihood:
    """Per answer token, float32 [A]. nll: nats of the right token; kl: divergence of the distribution from the dense
    one's, nats. agree: the likeliest token is the dense one's; right: it is the answer's, bool [A]. said: the likeliest
    tokens."""

    nll: Tensor
    kl: Tensor
    agree: Tensor
    right: Tensor
    said: list[int]


class AnswerTap:
    """Receives logits while a prompt with the answer at its end is read (teacher forcing).

    start: position whose logits predict the answer's first token. reference: the dense log-probabilities, float32
    [A, V], or None for the dense cache itself, which then has `logprobs` to be the reference of others. They are
    not halved to 16 bits: rounding would be a divergence of its own.
    """

    def __init__(self, answer: list[int], start: int, reference: Tensor | None = None) -> None:
        self.start = start
        self.logprobs: Tensor | None = None
        self._answer = torch.tensor(answer)
        self._reference = reference
        self._nll, self._kl = torch.full((2, len(answer)), torch.nan)
        self._said = torch.zeros(len(answer), dtype=torch.int64)

    @torch.inference_mode()
    def receive(self, first: int, logits: Tensor) -> None:
        """Logits float32 [n, V] at positions `first`, `first + 1`, ...; what predicts no answer token is left."""
        begin = first - self.start
        logits = logits[: len(self._answer) - begin]
        if not len(logits):
            return
        rows = slice(begin, begin + len(logits))
        found = logits.log_softmax(-1)
        self._nll[rows] = -found.gather(-1, self._answer[rows, None])[:, 0]
        self._said[rows] = found.argmax(-1)
        if self._reference is None:
            if self.logprobs is None:
                self.logprobs = found.new_empty(len(self._answer), found.shape[-1])
            self.logprobs[rows] = found
            self._kl[rows] = 0
        else:
            expected = self._reference[rows]
            # Negative only by rounding.
            self._kl[rows] = (expected.exp() * (expected - found)).sum(-1).clamp(min=0)

    def result(self) -> Likelihood:
        """Once every position was received."""
        if bool(self._nll.isnan().any()):
            raise RuntimeError("the engine has left out positions of an answer")
        dense = self._said if self._reference is None else self._reference.argmax(-1)
        return Likelihood(
            self._nll, self._kl, self._said == dense, self._said == self._answer, [int(t) for t in self._said]
        )
