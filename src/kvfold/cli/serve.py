"""`kvfold serve`: the OpenAI-compatible server."""

import importlib.util
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli import options
from kvfold.config.method import parse_method
from kvfold.config.size import parse_bytes
from kvfold.errors import ConfigError

KEY_VARIABLE = "KVFOLD_API_KEY"
CLUSTER_RESTARTS = 10  # within ten minutes: head nodes may come and go
LEVELS = ("debug", "info", "warning", "error")


def serve(
    model: options.Model = options.DEFAULT_MODEL,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            "--kv",
            help="A KV cache method that requests may ask for; may be repeated, the first is the default.",
            metavar="METHOD",
            show_default="none",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    kv_memory: options.KVMemory = "1GiB",
    dtype: options.Dtype = "auto",
    weights: options.Weights = "auto",
    calibration: options.Calibration = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name clients use (default: --model).")] = None,
    api_key: Annotated[
        str | None, typer.Option(help=f"Key that requests need (better: {KEY_VARIABLE} or --api-key-file).")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File whose first line is the key.")] = None,
    max_queue: Annotated[int, typer.Option(help="Requests without a token yet; more get 429.")] = 256,
    max_queue_tokens: Annotated[int | None, typer.Option(help="Prompt tokens of those; more get 429.")] = None,
    max_body: Annotated[str, typer.Option(help="Largest request body; larger ones get 413.", metavar="SIZE")] = "4MiB",
    body_timeout: Annotated[float, typer.Option(help="Seconds for a body to arrive.")] = 30.0,
    request_timeout: Annotated[float, typer.Option(help="Seconds from arrival to last token.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds that running requests have to finish on SIGTERM.")] = 30.0,
    chunk: Annotated[int, typer.Option(help="Prompt tokens of one request per step.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of all requests per step.")] = 512,
    max_sequences: Annotated[int, typer.Option(help="Sequences that run at once.")] = 256,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine (default: all cores).")] = None,
    seed: Annotated[int, typer.Option(help="For requests without their own.")] = 0,
    prefill_workers: Annotated[
        int | None, typer.Option(help="Workers that only read prompts; with 0 the others do both.")
    ] = None,
    decode_workers: Annotated[int | None, typer.Option(help="Workers that give the answers.")] = None,
    transport: Annotated[
        str, typer.Option(help="What carries KV pages between workers: tcp, ray, gloo or nccl.")
    ] = "tcp",
    ray_address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster: auto, HOST:PORT or ray://HOST:PORT."),
    ] = None,
    link_gbps: Annotated[float | None, typer.Option(help="Limit of what each worker sends, in Gbit/s.")] = None,
    stall_seconds: Annotated[float, typer.Option(help="Silence after which a transfer or worker is given up.")] = 20.0,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LEVELS)}; debug logs every access.")] = "info",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
) -> None:
    """Serve an OpenAI-compatible API, and a page to try it, with a compressed KV cache.

    SIGTERM or Ctrl-C lets running requests finish; a second one stops at once.
    """
    methods = tuple(dict.fromkeys(kv or ["none"]))
    for method in methods:
        parse_method(method)
    if log_level not in LEVELS:
        raise ConfigError(f"--log-level {log_level!r} is unknown; choose one of {', '.join(LEVELS)}")
    cluster = None
    if prefill_workers is not None or decode_workers is not None:
        from kvfold.cluster.options import ClusterOptions

        prefill, decode = (1 if count is None else count for count in (prefill_workers, decode_workers))
        cluster = ClusterOptions(prefill, decode, transport, ray_address, threads, link_gbps, stall_seconds)
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("workers need Ray, which is not installed; run `pip install 'kvfold[cluster]'`")
        if (ray_address or "").startswith("ray://") and importlib.util.find_spec("grpc") is None:
            raise ConfigError("ray:// needs grpcio, which is not installed; run `pip install 'kvfold[cluster]'`")
    elif ray_address is not None or link_gbps is not None:
        raise ConfigError("--ray-address and --link-gbps are for workers; give --prefill-workers and --decode-workers")
    memory, body = parse_bytes(kv_memory), parse_bytes(max_body)
    key = _read_key(api_key, api_key_file)

    from kvfold.methods.registry import build_method
    from kvfold.server.engine_client import Program
    from kvfold.server.messages import EngineOptions
    from kvfold.server.options import ServerOptions
    from kvfold.server.serve import listen
    from kvfold.server.serve import serve as run

    for method in methods:
        build_method(method)
    engine = EngineOptions(
        model=model,
        kv=methods,
        kv_memory=memory,
        dtype=dtype,
        weights=weights,
        seed=seed,
        calibration=None if calibration is None else str(calibration),
        chunk=chunk,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        threads=threads,
    )
    server = ServerOptions(
        served_model_name or model,
        key,
        max_queue,
        max_queue_tokens,
        body,
        body_timeout,
        request_timeout,
        grace,
        log_prompts,
    )
    logging.basicConfig(
        stream=sys.stderr, level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    program = None
    if cluster is not None:
        both = {"engine": asdict(engine), "cluster": asdict(cluster)}
        program = Program("kvfold.cluster.process", both, CLUSTER_RESTARTS)
    run(listen(host, port), engine, server, log_level, program)


def _read_key(given: str | None, file: Path | None) -> str | None:
    """The API key from the command line, a file or the environment, in this order. Raises ConfigError."""
    import os

    if given is not None and file is not None:
        raise ConfigError("--api-key and --api-key-file contradict each other; give one of them")
    if file is None:
        return given if given is not None else os.environ.get(KEY_VARIABLE)
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API key from {file} ({error}); name a readable text file") from error
    if not lines or not lines[0].strip():
        raise ConfigError(f"{file} has no API key in its first line; write one there")
    return lines[0].strip()
