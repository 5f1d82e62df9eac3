"""`kvfold demo`: one long document, one question, a dense and a compressed KV cache side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import kvfold
from kvfold.cli import options
from kvfold.cli.demo_document import ANSWER, QUESTION, demo_prompt
from kvfold.cli.output import print_json, shown
from kvfold.cli.progress import ConsoleProgress

DENSE = "none"


@dataclass(frozen=True)
class Run:
    """What one method did: sizes in bytes, speeds in tokens per second (0 where nothing was timed)."""

    kv: str
    prompt_tokens: int
    kv_bytes: int
    bytes_per_token: float
    compression: float
    prefill_speed: float
    decode_speed: float
    answer: str
    right: bool


def demo(
    model: options.Model = options.DEFAULT_MODEL,
    kv: options.KV = "zeroc(bits=4)",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to answer with.", metavar="N")] = 64,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Answer a question over a document of 6,000 tokens with the dense cache and with METHOD."""
    from kvfold.methods.registry import build_method

    build_method(kv)  # a misspelt method fails before the dense run
    prompt = demo_prompt()
    runs = [run_once(model, method, prompt, max_tokens, dtype) for method in (DENSE, kv)]
    if json:
        print_json({"model": model, "question": QUESTION, "runs": runs})
    else:
        print_runs(model, runs)


def run_once(model: str, kv: str, prompt: str, max_tokens: int, dtype: str) -> Run:
    """Answer `prompt` with an engine of its own, so that no run profits from another's cache."""
    progress = ConsoleProgress()
    llm = kvfold.LLM(model, kv=kv, dtype=dtype, progress=progress)
    messages = [{"role": "user", "content": prompt}]
    output = llm.chat(messages, kvfold.SamplingParams(temperature=0.0, max_tokens=max_tokens), progress=progress)[0]
    return summarise(kv, output)


def summarise(kv: str, output: "kvfold.RequestOutput") -> Run:
    """The figures of a finished request. The first token ends prefill; decoding makes all the others."""
    completion, metrics = output.outputs[0], output.metrics
    prefill = metrics.ttft or 0.0
    decode = (metrics.latency or 0.0) - prefill
    answer = completion.text.strip()
    return Run(
        kv=kv,
        prompt_tokens=len(output.prompt_token_ids),
        kv_bytes=output.kv.bytes,
        bytes_per_token=output.kv.bytes / max(output.kv.tokens, 1),
        compression=output.kv.compression,
        prefill_speed=len(output.prompt_token_ids) / prefill if prefill > 0 else 0.0,
        decode_speed=(len(completion.token_ids) - 1) / decode if decode > 0 else 0.0,
        answer=answer,
        right=all(part in answer for part in ANSWER),
    )


ROWS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("KV bytes held", lambda run: shown("bytes", run.kv_bytes)),
    ("bytes per token", lambda run: f"{run.bytes_per_token:,.0f}"),
    ("compression", lambda run: shown("compression", run.compression)),
    ("prefill tokens/s", lambda run: f"{run.prefill_speed:,.0f}"),
    ("decode tokens/s", lambda run: f"{run.decode_speed:,.1f}"),
    ("answer", lambda run: run.answer),
)


def print_runs(model: str, runs: list[Run]) -> None:
    """Print one table: a row per figure, a column per method."""
    title = f"{model} over {runs[0].prompt_tokens:,} tokens\n{QUESTION}"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("")
    for run in runs:
        table.add_column(Text(run.kv), overflow="fold")
    for name, cell in ROWS:
        table.add_row(name, *(Text(cell(run)) for run in runs))
    Console().print(table)
