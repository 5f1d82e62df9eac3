"""Linear layers of SmolLM2-135M (30 layers, without the head) with packed weights, beside torch's float32.

    python -m benchmarks.linear --tokens 1 8 32 512 --threads 2

Per number of tokens and format: milliseconds for all layers (median of --repetitions, formats in turns), billions of
operations a second, and how fast the weights are read.
"""

import argparse
import time
from statistics import median

import torch

from kvfold.model.linear import Linear, TorchLinear
from kvfold.model.packed import PackedLinear

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
LAYERS = 30
FORMATS = {"float32 (torch)": None, "bfloat16": 16, "int8": 8, "int4": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {name: [make(bits) for _ in range(LAYERS)] for name, bits in FORMATS.items()}
    print(f"{'tokens':>6} {'weights':>16} {'ms':>8} {'GOP/s':>7} {'GB/s':>6}")
    for tokens in options.tokens:
        inputs = {k: torch.randn(tokens, k) for _, k in SHAPES}
        taken: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.repetitions + 1):
            for name, layers in models.items():
                taken[name].append(seconds(layers, inputs))
        for name, layers in models.items():
            each = median(taken[name][1:])
            work = 2 * tokens * LAYERS * sum(rows * k for rows, k in SHAPES)
            read = sum(linear.nbytes for layer in layers for linear in layer)
            print(f"{tokens:>6} {name:>16} {1e3 * each:>8.1f} {work / each / 1e9:>7.0f} {read / each / 1e9:>6.1f}")


def make(bits: int | None) -> list[Linear]:
    plain = [TorchLinear(torch.randn(rows, inputs)) for rows, inputs in SHAPES]
    return list(plain) if bits is None else [PackedLinear(linear, bits) for linear in plain]


@torch.inference_mode()
def seconds(layers: list[list[Linear]], inputs: dict[int, torch.Tensor]) -> float:
    start = time.perf_counter()
    for layer in layers:
        for (_, k), linear in zip(SHAPES, layer, strict=True):
            linear(inputs[k])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
