"""`kvfold generate`: continue prompts, all of them as one batch."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kvfold
from kvfold.cli import options, parallel
from kvfold.cli.output import print_curve, print_json, shown
from kvfold.cli.progress import ConsoleProgress
from kvfold.config.method import parse_method
from kvfold.config.size import parse_bytes
from kvfold.errors import ConfigError, PromptError

STDIN = Path("-")


def generate(
    model: options.Model = options.DEFAULT_MODEL,
    kv: options.KV = "none",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue; may be repeated.", metavar="TEXT")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option("--prompt-file", help="File with a prompt, - for stdin; may be repeated.", metavar="FILE"),
    ] = None,
    context_file: Annotated[
        Path | None,
        typer.Option(
            "--context-file",
            help="File with a document that stands before each prompt; methods with compress=context compress it "
            "before they read the prompt, and it is read once.",
            metavar="FILE",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat/--raw", help="Put each prompt into the model's chat template, or take it as it is."),
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 is all.")] = 0,
    seed: Annotated[int, typer.Option(help="Makes sampling reproducible.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Text that ends the output; may be repeated.", metavar="TEXT"),
    ] = None,
    kv_memory: options.KVMemory = "1GiB",
    dtype: options.Dtype = "auto",
    weights: options.Weights = "auto",
    calibration: options.Calibration = None,
    sequence_parallel: parallel.Ranks = None,
    variant: parallel.Variant = "ring",
    wire_bits: parallel.WireBits = 16,
    rank_timeout: parallel.Timeout = 120.0,
    json: options.Json = False,
) -> None:
    """Continue one or more prompts; several run as one batch.

    The texts go to stdout and the summary to stderr, so that a text can be piped on.
    """
    parse_method(kv)
    memory = parse_bytes(kv_memory)
    spread = None
    if sequence_parallel is not None:
        spread = parallel.make_config(
            sequence_parallel,
            variant,
            model=model,
            kv=kv,
            kv_memory=memory,
            dtype=dtype,
            weights=weights,
            calibration=None if calibration is None else str(calibration),
            wire_bits=wire_bits,
            timeout=rank_timeout,
        )
        if parallel.followed(spread):
            return
    prompts = read_prompts(prompt or [], prompt_file or [])
    context = None if context_file is None else read_prompts([], [context_file])[0]

    params = kvfold.SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or None
    )
    if spread is not None:
        if context is not None:
            raise ConfigError("--context-file does not go with --sequence-parallel; put the document into the prompt")
        answers = parallel.run_parallel(spread, prompts, chat, params, seed)
        _print(model, kv, answers.requests, answers.seconds, [], json, answers.wire)
        return
    progress = ConsoleProgress()
    llm = kvfold.LLM(
        model,
        kv=kv,
        kv_memory=memory,
        dtype=dtype,
        weights=weights,
        seed=seed,
        calibration=calibration,
        progress=progress,
    )
    if not json:
        print_curve(llm.curve)
    started = time.perf_counter()
    if chat:
        before = [] if context is None else [{"role": "system", "content": context}]
        conversations = [[*before, {"role": "user", "content": text}] for text in prompts]
        outputs = llm.chat(conversations, params, progress=progress)
    else:
        marked = [text if context is None else {"context": context, "prompt": text} for text in prompts]
        outputs = llm.generate(marked, params, progress=progress)
    seconds = time.perf_counter() - started
    _print(model, kv, outputs, seconds, llm.curve, json)


def _print(
    model: str,
    kv: str,
    outputs: list["kvfold.RequestOutput"],
    seconds: float,
    curve: list[Any],
    json: bool,
    wire: dict[str, Any] | None = None,
) -> None:
    """Texts and summary, or one JSON object. wire: what went between the ranks, if there were several."""
    if json:
        results = [_result(output) for output in outputs]
        more = {} if wire is None else {"wire": wire}
        print_json({"model": model, "kv": kv, "seconds": seconds, "curve": curve, "outputs": results, **more})
        return
    for index, output in enumerate(outputs):
        if len(outputs) > 1:
            typer.echo(f"--- prompt {index + 1}")
        typer.echo(output.outputs[0].text)
    sys.stdout.flush()
    _print_summary(outputs, seconds)
    if wire is not None:
        parallel.print_wire(wire)


def read_prompts(texts: list[str], files: list[Path]) -> list[str]:
    """The prompts given as options, then those in files.

    Raises:
        PromptError: none is given, one is empty, or a file cannot be read as text.
    """
    from kvfold.calibration.text import read_text

    prompts = list(texts)
    for file in files:
        prompts.append(_read_stdin() if file == STDIN else read_text(file).content)
    if not prompts:
        raise PromptError("There is no prompt: give --prompt TEXT or --prompt-file FILE.")
    if not all(text.strip() for text in prompts):
        raise PromptError("A prompt is empty: give it some text.")
    return prompts


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise PromptError("stdin is not UTF-8 text: convert it or give another prompt.") from error


def _result(output: "kvfold.RequestOutput") -> dict[str, Any]:
    completion, kv, metrics = output.outputs[0], output.kv, output.metrics
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "kv": {
            "bytes": kv.bytes,
            "dense_bytes": kv.dense_bytes,
            "tokens": kv.tokens,
            "compression": kv.compression,
            "bits_per_element": kv.bits_per_element,
        },
        "ttft": metrics.ttft,
        "latency": metrics.latency,
    }


def _print_summary(outputs: list["kvfold.RequestOutput"], seconds: float) -> None:
    table = Table(caption=f"{seconds:.1f} s", caption_justify="left")
    for name in ("prompt", "prompt tokens", "new tokens", "finished by", "KV bytes", "dense", "compression"):
        table.add_column(name, justify="right", no_wrap=" " not in name)  # a cut word says nothing
    for index, output in enumerate(outputs):
        completion, kv = output.outputs[0], output.kv
        table.add_row(
            str(index + 1),
            f"{len(output.prompt_token_ids):,}",
            f"{len(completion.token_ids):,}",
            str(completion.finish_reason),
            shown("bytes", kv.bytes),
            shown("bytes", kv.dense_bytes),
            shown("compression", kv.compression),
        )
    Console(stderr=True).print(table)
