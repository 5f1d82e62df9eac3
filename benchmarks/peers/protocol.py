"""What the orchestrator and a runner say to each other: one JSON object a line, in and out. Standard library only.

A runner is a process in its peer's own environment that holds one model. It first says what it is

    {"peer": "kvfold", "version": "0.1.0", "weights": "bf16", "kv": "bf16", "weight_bytes": 269060352}

or {"error": "..."}, and then answers requests, always with `peak_rss` (bytes, loading excluded):

    {"op": "prefill", "batch": 1, "context": 2047, "seed": 3}  -> {"seconds": 3.1, "tokens": 2047, "kv_bytes": ...}
    {"op": "hold", "batch": 8, "context": 1920, "seed": 3}     -> {"seconds": 25.0, "tokens": 15360}
    {"op": "decode", "steps": 16, "limit": 30.0}               -> {"seconds": 1.2, "tokens": 128, "steps": 16,
                                                                   "held": 15444, "kv_bytes": ...}
    {"op": "drop"}                                             -> {}

`prefill` reads the prompts, samples the first token of each and forgets them; `hold` does the same and keeps them;
`decode` goes on with what is held, one new token per sequence and step. What is timed, and how, is in this file alone,
so it is the same for all peers: seconds of `decode` contain whole steps and nothing of any prompt.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

Prompts = list[list[int]]


class Peer(Protocol):
    """One engine with one model loaded, and at most one batch of sequences that it holds."""

    def about(self) -> dict[str, Any]:
        """`peer`, `version`, `weights` and `kv` (precisions), `weight_bytes` (what a step reads of the model)."""
        ...

    def read(self, prompts: Prompts) -> None:
        """Computes all prompts and samples the first token of each. Nothing is held before."""
        ...

    def step(self) -> None:
        """One new token for every sequence held."""
        ...

    def held(self) -> tuple[int, int]:
        """Tokens and bytes in the KV cache, of all sequences together."""
        ...

    def drop(self) -> None:
        """Forgets all sequences."""
        ...


def prompts(batch: int, length: int, seed: int) -> Prompts:
    """Random token ids, the same for every peer; no two prompts begin alike, so nothing can be shared."""
    generator = random.Random(seed)
    return [[generator.randrange(1000, 40_000) for _ in range(length)] for _ in range(batch)]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What every runner is started with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="directory (GGUF file for llama.cpp)")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--kv", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="most sequences at once")
    parser.add_argument("--context", type=int, required=True, help="most tokens of a sequence, new ones included")
    return parser.parse_args(argv)


def serve(load: Callable[[argparse.Namespace], Peer]) -> None:
    """The main program of a runner: loads the peer and answers until stdin ends."""
    options = arguments()
    # Libraries print as they like: only this copy of stdout still leads to the orchestrator.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        peer = load(options)
        _say(answers, peer.about())
        _reset_peak()
        for line in sys.stdin:
            _say(answers, {**answer(peer, json.loads(line)), "peak_rss": peak_rss()})
    except Exception as error:
        _say(answers, {"error": f"{type(error).__name__}: {error}"})
        raise


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Carries out one request."""
    match request["op"]:
        case "prefill":
            return _read(peer, request, keep=False)
        case "hold":
            return _read(peer, request, keep=True)
        case "decode":
            return _decode(peer, request["steps"], request["limit"])
        case "drop":
            peer.drop()
            return {}
        case other:
            raise ValueError(f"unknown op {other!r}")


def _read(peer: Peer, request: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    listed = prompts(request["batch"], request["context"], request["seed"])
    began = time.perf_counter()
    peer.read(listed)
    seconds = time.perf_counter() - began
    kv_bytes = peer.held()[1]
    if not keep:
        peer.drop()
    return {"seconds": seconds, "tokens": sum(map(len, listed)), "kv_bytes": kv_bytes}


def _decode(peer: Peer, steps: int, limit: float) -> dict[str, Any]:
    """At most `steps` steps; fewer (at least one) where they take more than `limit` seconds."""
    before, _ = peer.held()
    began = time.perf_counter()
    done = 0
    while done < steps:
        peer.step()
        done += 1
        seconds = time.perf_counter() - began
        if seconds > limit:
            break
    after, kv_bytes = peer.held()
    found = {"seconds": seconds, "steps": done, "tokens": after - before}
    return {**found, "held": (before + after) / 2, "kv_bytes": kv_bytes}


def peak_rss() -> int:
    """Bytes, since `_reset_peak`."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")
    except OSError:
        pass  # then the peak includes loading


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
