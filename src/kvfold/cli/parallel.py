"""Options and commands of sequence parallelism: `generate --sequence-parallel`, and `kvfold parallel`."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvfold.cli import options
from kvfold.cli.output import print_json
from kvfold.cli.progress import ConsoleProgress
from kvfold.config.size import format_bytes
from kvfold.errors import ConfigError

if TYPE_CHECKING:
    from kvfold.engine.outputs import RequestOutput
    from kvfold.engine.params import SamplingParams
    from kvfold.parallel.generating import ParallelOutput
    from kvfold.parallel.loading import ParallelConfig

Ranks = Annotated[
    int | None,
    typer.Option(
        "--sequence-parallel",
        help="Spread each prompt and its cache over N processes: of this machine, or of several, where RANK is set as "
        "torchrun does it.",
        metavar="N",
    ),
]
Variant = Annotated[
    str, typer.Option("--parallel", help="What the processes exchange: ring (rows) or ulysses (heads).", metavar="HOW")
]
WireBits = Annotated[
    int,
    typer.Option(help="Queries, outputs and uncompressed rows between processes: 16, or 4 to 8, which loses a little."),
]
Timeout = Annotated[float, typer.Option("--rank-timeout", help="Seconds after which a silent process counts as lost.")]


@dataclass(frozen=True)
class Answers:
    """What a parallel run printed from: outputs as the engine's, and bytes on the wire."""

    outputs: list["ParallelOutput"]
    wire: dict[str, Any]
    seconds: float

    @property
    def requests(self) -> list["RequestOutput"]:
        return [each.request for each in self.outputs]


def make_config(ranks: int, variant: str, **settings: Any) -> "ParallelConfig":
    from kvfold.parallel.loading import ParallelConfig
    from kvfold.parallel.split import VARIANTS

    chosen = next((each for each in VARIANTS if each == variant), None)
    if chosen is None:
        raise ConfigError(f"--parallel {variant!r} is unknown; choose {' or '.join(VARIANTS)}")
    return ParallelConfig(ranks, variant=chosen, **settings)


def followed(config: "ParallelConfig") -> bool:
    """Whether this process is a rank other than 0; it has then followed rank 0, which has the prompts, to the end."""
    from kvfold.parallel.launch import follow, launched_rank

    if not launched_rank():
        return False
    follow(config)
    return True


def run_parallel(
    config: "ParallelConfig", prompts: list[str], chat: bool, params: "SamplingParams", seed: int
) -> Answers:
    """Answers prompts one after the other, on rank 0."""
    from kvfold.engine.prompts import encode, render_chat
    from kvfold.parallel.generating import ParallelGenerator
    from kvfold.parallel.launch import joined_ranks, launched_rank, local_ranks

    progress = ConsoleProgress()
    with (local_ranks if launched_rank() is None else joined_ranks)(config, progress) as (group, loaded):
        tokenizer = loaded.model.tokenizer
        started, outputs = time.perf_counter(), []
        generator = ParallelGenerator(group, loaded.model, seed)
        for text in prompts:
            if chat:
                whole = render_chat(tokenizer, [{"role": "user", "content": text}])
                ids = encode(tokenizer, whole, add_special_tokens=False)
            else:
                ids = encode(tokenizer, text)
            outputs.append(generator.generate(ids, params, text, progress))
        seconds = time.perf_counter() - started
        return Answers(outputs, _wire(config, group, outputs), seconds)


def _wire(config: "ParallelConfig", group: Any, outputs: list["ParallelOutput"]) -> dict[str, Any]:
    """Bytes on the wire while prompts were read, against 16-bit rows that are not compressed."""
    from kvfold.parallel.traffic import uncompressed_bytes

    kinds: Counter[str] = Counter()
    begin: Counter[str] = Counter()
    total = dense = 0
    spec = group.spec
    for output in outputs:
        for each in output.prefill:
            kinds.update(each.sent.bytes)
        kinds.subtract(begin)
        begin = Counter()
        for each in output.total:
            begin.update(each.sent.bytes)
        total = sum(begin.values())
        tokens = len(output.request.prompt_token_ids)
        shape = (config.ranks, tokens, spec.n_layers, spec.heads, spec.kv_heads, spec.head_dim)
        dense += uncompressed_bytes(config.variant, *shape)
    prefill = sum(kinds.values())
    return {
        "ranks": config.ranks,
        "parallel": config.variant,
        "wire_bits": config.wire_bits,
        "prefill_bytes": prefill,
        "prefill_bytes_by_kind": {kind: size for kind, size in kinds.items() if size},
        "uncompressed_prefill_bytes": dense,
        "prefill_share": prefill / dense if dense else None,
        "decode_bytes": total - prefill,
        "kv_bytes_by_rank": [each.held for each in outputs[-1].total],
    }


def print_wire(wire: dict[str, Any]) -> None:
    """One line on stderr."""
    share = wire["prefill_share"]
    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in wire["prefill_bytes_by_kind"].items())
    typer.echo(
        f"{wire['ranks']} ranks ({wire['parallel']}): {format_bytes(wire['prefill_bytes'])} on the wire for prompts"
        + (f", {share:.3f} of uncompressed" if share is not None else "")
        + (f" ({kinds})" if kinds else "")
        + f"; {format_bytes(wire['decode_bytes'])} while decoding",
        err=True,
    )


def parallel(
    model: options.Model = options.DEFAULT_MODEL,
    kv: options.KV = "zeroc(bits=4)",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 8192,
    workers: Annotated[
        list[int] | None, typer.Option("--workers", help="Number of workers; may be repeated.", metavar="N")
    ] = None,
    wire_bits: Annotated[
        list[int] | None, typer.Option("--wire-bits", help="16, or 4 to 8; may be repeated.", metavar="BITS")
    ] = None,
    gigabits: Annotated[float, typer.Option("--gigabits", help="Each worker's link in Gb/s, both ways.")] = 10.0,
    latency: Annotated[float, typer.Option("--latency", help="Microseconds per message.")] = 50.0,
    teraflops: Annotated[float, typer.Option("--teraflops", help="What one worker computes in a second.")] = 1.0,
    calibration: options.Calibration = None,
    json: options.Json = False,
) -> None:
    """Bytes that a prompt puts on the wire over N workers, and the seconds that a network makes of them.

    Exact for the bytes (the layout of the calibrated method); the seconds are a model: docs/parallel.md has it.
    """
    from kvfold.parallel.estimate import estimate

    rows = estimate(
        make_config(1, "ring", model=model, kv=kv, dtype="bfloat16", calibration=calibration and str(calibration)),
        tokens,
        workers or [2, 4, 8],
        wire_bits or [16, 8, 6],
        gigabits=gigabits,
        microseconds=latency,
        teraflops=teraflops,
        progress=ConsoleProgress(),
    )
    if json:
        print_json({"model": model, "kv": kv, "tokens": tokens, "rows": [row.as_dict() for row in rows]})
        return
    caption = f"{model}, {kv}, {tokens:,} tokens; {gigabits:g} Gb/s, {latency:g} us, {teraflops:g} TFLOP/s a worker"
    table = Table(caption=caption, caption_justify="left")
    for name in (
        "workers",
        "exchange",
        "wire bits",
        "bytes",
        "of GQA",
        "of MHA",
        "seconds",
        "uncompressed",
        "one worker",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.workers),
            row.variant,
            str(row.wire_bits),
            format_bytes(row.bytes),
            f"{row.share:.3f}",
            f"{row.share_mha:.3f}",
            f"{row.seconds:.2f}",
            f"{row.seconds_uncompressed:.2f}",
            f"{row.seconds_alone:.2f}",
        )
    Console().print(table)
