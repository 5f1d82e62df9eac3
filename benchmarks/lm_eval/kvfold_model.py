"""kvfold as a model of lm-evaluation-harness: `python kvfold_model.py run --model kvfold --model_args kv=METHOD ...`.

In one process with the engine, for what a server cannot be asked through OpenAI's API: to score an answer after the
*prompt* has been compressed. A server is sent prompt and answer as one text and reads both before a policy chooses.
"""

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from kvfold.engine.llm import LLM
from kvfold.engine.outputs import RequestOutput
from kvfold.engine.params import SamplingParams
from kvfold.engine.sequence import LogitsTap
from kvfold.errors import ConfigError, KvfoldError, ModelError
from kvfold.methods.registry import build_method

Scored = tuple[float, bool]
Encoded = tuple[tuple[str, str], list[int], list[int]]
_FORCED = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


class Answer:
    """How a prompt's last tokens are predicted by what comes before them: the likelihood of the right ones alone, of
    thousands of answers at a time. start: position whose logits predict the first of them."""

    def __init__(self, token_ids: list[int], start: int) -> None:
        self._start = start
        self._ids = torch.tensor(token_ids)
        self._logprobs = torch.full((len(token_ids),), torch.nan)
        self._likeliest = torch.zeros(len(token_ids), dtype=torch.bool)
        self.tap = LogitsTap(start, self._receive)

    def _receive(self, first: int, logits: Tensor) -> None:
        begin = first - self._start
        logits = logits[: len(self._ids) - begin]  # the last position predicts what is not scored
        rows = slice(begin, begin + len(logits))
        right = self._ids[rows]
        self._logprobs[rows] = logits.log_softmax(-1).gather(-1, right[:, None])[:, 0]
        self._likeliest[rows] = logits.argmax(-1) == right

    @property
    def scored(self) -> Scored:
        """The answer's log-probability and whether greedy decoding would give it."""
        return float(self._logprobs.sum()), bool(self._likeliest.all())


@register_model("kvfold")
class KVFold(TemplateLM):
    """Arguments are those of `kvfold.engine.llm.LLM`, with one method as `kv`.

    Methods that choose when the prompt is read have to say `compress=context`, which here is all of the prompt but its
    last token: that token predicts the answer's first one through the compressed cache. `compress=prompt` would choose
    after a scored answer. Raises ConfigError for it, and for an argument that LLM does not have.
    """

    backend = "causal"

    def __init__(self, kv: str = "none", batch_size: int | str = 1, **options: Any) -> None:
        super().__init__()
        method = build_method(kv)
        if method.staged and method.compress != "context":
            raise ConfigError(
                f"{kv} would compress after the answers that are scored; add compress=context to its policy, or write "
                f'"staged(compress=context)+..." for a codec'
            )
        # batch_size comes from the harness; the engine batches by itself.
        for foreign in ("device", "max_batch_size"):
            options.pop(foreign, None)
        known = inspect.signature(LLM).parameters
        for name in options.keys() - known.keys():
            raise ConfigError(f"model argument {name!r} is unknown; choose from {', '.join(known)}")
        self._llm = LLM(kv=kv, **options)
        self.tokenizer = self._llm.model.tokenizer
        self._longest = self._llm.model.spec.max_positions - 1

    @property
    def tokenizer_name(self) -> str:
        return self._llm.model.fingerprint

    @property
    def eot_token_id(self) -> int:
        ends = self._llm.model.spec.eos_token_ids
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        start: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any) -> list[Scored]:
        found = []
        for _, prompt, ids in tqdm(requests, desc="answers", disable=disable_tqdm):
            prompt = prompt[-(self._longest - len(ids)) :]
            answer = Answer(ids, len(prompt) - 1)
            self._llm.engine.add_request(prompt + ids, _FORCED, context=self._context(prompt), tap=answer.tap)
            # One after another: what is kept of a prompt then serves the other answers to it.
            self._run()
            found.append(answer.scored)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self._longest, 1)
            encoded = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(encoded, disable_tqdm)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        ids = []
        for text, options in (request.args for request in requests):
            count = int(options.get("max_gen_toks", options.get("max_tokens", 256)))
            prompt = self.tok_encode(text)[-(self._longest - count) :]
            params = SamplingParams(
                max_tokens=count,
                temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                stop=handle_stop_sequences(options.get("until"), self.tokenizer.decode([self.eot_token_id])),
            )
            ids.append(self._llm.engine.add_request(prompt, params, context=self._context(prompt)))
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            done = {output.request_id: output for output in self._run(bar)}
        return [done[each].outputs[0].text for each in ids]

    @staticmethod
    def _context(prompt: list[int]) -> int:
        return max(1, len(prompt) - 1)

    def _run(self, bar: tqdm | None = None) -> list[RequestOutput]:
        """Runs all requests to their end. Raises ModelError where the model gives no numbers."""
        finished = []
        while self._llm.engine.has_unfinished:
            for output in self._llm.engine.step():
                if output.finished:
                    if output.outputs[0].finish_reason == "error":
                        raise ModelError(str(output.outputs[0].stop_reason))
                    finished.append(output)
                    if bar is not None:
                        bar.update()
        return finished


if __name__ == "__main__":
    try:
        cli_evaluate()
    except KvfoldError as error:
        sys.exit(f"error: {error}")
