"""A completion as it grows: which token ends it, and what its text is."""

from kvfold.engine.detokenizer import Detokenizer, TokenDecoder
from kvfold.engine.outputs import CompletionOutput, FinishReason, Logprob
from kvfold.engine.row_state import RowState


class Completion:
    """One answer to a prompt, as the sampler (`row`) and its reader (`output`) see it; both share its tokens.

    limit: tokens, prompt and output, at which it ends.
    """

    def __init__(self, row: RowState, tokenizer: TokenDecoder, limit: int, index: int = 0) -> None:
        self.row = row
        self.output = CompletionOutput(
            index, token_ids=row.output_token_ids, logprobs=None if row.params.logprobs is None else []
        )
        self.detokenizer = Detokenizer(tokenizer, row.params)
        self.limit = limit

    def __len__(self) -> int:
        return len(self.row.prompt_token_ids) + len(self.output.token_ids)

    def take(self, token: int, logprobs: dict[int, Logprob] | None) -> bool:
        """Appends a token that was sampled. Returns whether it is the last one; the completion has then ended."""
        output, params = self.output, self.row.params
        output.token_ids.append(token)
        if logprobs is not None and output.logprobs is not None:
            output.logprobs.append(logprobs)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs[token].logprob
        complete = self.row.grammar_ended
        ends = token in self.row.stop_ids and (complete or not self.row.below_min_tokens)
        if not ends:
            self.detokenizer.push(token)
        stopped_by = self.detokenizer.stopped_by
        if ends:
            self.end("stop", token if token in params.stop_ids else None)
        elif stopped_by is not None or complete:
            self.end("stop", stopped_by)
        elif len(self) >= self.limit:
            self.end("length")
        else:
            output.text = self.detokenizer.text
        return output.finished

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """No token follows; text that was held back for one is told."""
        self.detokenizer.finish()
        self.output.text = self.detokenizer.text
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason
