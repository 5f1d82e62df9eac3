"""Attention over compressed pages on a GPU: correct first, then fast.

    python benchmarks/gpu.py --out results

One command and one run: (1) every format against the reference, outputs and page bytes; (2) a measured copy; (3) sizes
of programs tuned; (4) decode attention in the shapes of an 8B model, dense and in 8, 4, 3 and 2 bits, beside torch's
FlashAttention and FlexAttention; (5) decoding with a random-weight Llama-3-8B and a fixed KV memory. Writes gpu.json
after each part (so that an interrupted run leaves what it has) and gpu.md. Exit code 1 if a result is wrong.
--smoke: all of it in tiny shapes, without a GPU in Triton's interpreter, where times mean nothing.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

import triton
from gpu_attention import check, copy_rate, decode, tuned
from gpu_cases import Shape
from gpu_decode import Size, whole_model

from kvfold.attention.triton.backend import TritonBackend
from kvfold.attention.triton.tuning import Tuning

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--kv-memory", type=int, default=16, help="GiB of KV pages of the whole model")
    parser.add_argument("--parts", default="check,copy,tune,attention,model", help="what to run, in this order")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no GPU here; --smoke runs everything in tiny shapes in the interpreter")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"device": _device(device), "torch": torch.__version__, "triton": triton.__version__}
    parts = options.parts.split(",")
    run = _smoke if options.smoke else _full
    for part, value in run(device, parts, options.kv_memory * GIB):
        result[part] = value
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (options.out / "gpu.md").write_text(table(result), encoding="utf-8")
        print(f"{part}: done", file=sys.stderr, flush=True)
    print(table(result))
    return 0 if all(row["ok"] for row in result.get("check", [])) else 1


def _full(device: torch.device, parts: list[str], memory: int) -> Iterable[tuple[str, Any]]:
    shape, backend = Shape(), TritonBackend()
    if "check" in parts:
        yield "check", check(backend, shape, [700, 1, 93], device)
    if "copy" in parts:
        yield "copy_bytes_per_s", copy_rate(device, 4 * GIB)
    if "tune" in parts:
        backend, rows = tuned(shape, 32768, 8, device)
        yield "tuning", {"chosen": asdict(backend.decode), "tried": rows}
        yield "check_tuned", check(backend, shape, [700, 1, 93], device)
    if "attention" in parts:
        cells = [(context, batch) for context in (8192, 32768, 131072) for batch in (1, 8, 32)]
        yield "attention", list(decode(backend, shape, cells, device, 20))
    if "model" in parts:
        yield "model", whole_model(backend, Size(), memory, (8192, 32768), 256, device, 20)


def _smoke(device: torch.device, parts: list[str], memory: int) -> Iterable[tuple[str, Any]]:
    shape = Shape(2, 1, 32)
    backend = TritonBackend(Tuning(keys=64, programs=1), Tuning(rows=64, keys=64))
    if "check" in parts:
        yield "check", check(backend, shape, [90], device)
    if "copy" in parts:
        yield "copy_bytes_per_s", copy_rate(device, 2**20)
    if "attention" in parts:
        yield "attention", list(decode(backend, shape, [(300, 1)], device, 1))
    if "model" in parts:
        yield "model", whole_model(backend, Size(shape, 1, 32, 64, 64), 2**18, (200,), 2, device, 1)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter on a CPU"


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [f"Device: {result['device']}; torch {result['torch']}, triton {result['triton']}.", ""]
    for part in ("check", "check_tuned"):
        for row in result.get(part, []):
            verdict = "right" if row["ok"] else "WRONG"
            lines.append(f"- {part}, {row['format']}: {verdict}, relative error {row['relative_error']:.1e}, "
                         f"{row['different_bytes']} page bytes differ")  # fmt: skip
    copy = result.get("copy_bytes_per_s")
    if copy:
        lines += ["", f"Copy: {copy / 1e9:.0f} GB/s read and written."]
    if "tuning" in result:
        lines += ["", f"Sizes of programs: {result['tuning']['chosen']}."]
    if "attention" in result:
        lines += ["", "Decode attention of one layer (one new token per sequence).", ""]
        lines += ["| context | batch | what | µs | spread | GB/s | of the copy | speed-up over flash |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        flash = {
            (row["context"], row["batch"]): row["median_s"]
            for row in result["attention"]
            if row["what"] == "sdpa flash" and "median_s" in row
        }
        for row in result["attention"]:
            head = f"| {row['context']} | {row['batch']} | {row['what']} |"
            if "error" in row:
                lines.append(f"{head} {row['error'].splitlines()[0]} | | | | |")
                continue
            base = flash.get((row["context"], row["batch"]))
            share = f"{row['bytes_per_s'] / copy:.0%}" if copy else ""
            ratio = f"{base / row['median_s']:.2f}" if base else ""
            times = f"{row['median_s'] * 1e6:.1f} | {row['spread_s'] * 1e6:.1f}"
            lines.append(f"{head} {times} | {row['bytes_per_s'] / 1e9:.0f} | {share} | {ratio} |")
    if "model" in result:
        lines += ["", "Decoding with the whole model, random weights, fixed KV memory.", ""]
        lines += ["| context | format | sequences | ms per step | tokens/s | over dense |", "|---|---|---|---|---|---|"]
        dense = {
            row["context"]: row["tokens_per_s"]
            for row in result["model"]
            if row["format"] == "dense" and "tokens_per_s" in row
        }
        for row in result["model"]:
            head = f"| {row['context']} | {row['format']} | {row['batch']} |"
            if "error" in row:
                lines.append(f"{head} {row['error'].splitlines()[0]} | | |")
                continue
            base = dense.get(row["context"])
            ratio = f"{row['tokens_per_s'] / base:.2f}" if base else ""
            lines.append(f"{head} {row['median_s'] * 1e3:.2f} | {row['tokens_per_s']:.0f} | {ratio} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
