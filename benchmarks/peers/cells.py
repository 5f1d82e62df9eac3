"""What is measured: cells (a workload each) and configurations (a peer with its precisions)."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
DENSE_TOKEN = 23_040
"""Bytes of a token in a dense 16-bit cache of SmolLM2-135M."""


@dataclass(frozen=True)
class Cell:
    """kind: what the seconds are of. context: tokens of a sequence at the end, prompt and new ones together."""

    kind: Literal["prefill", "decode"]
    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch} x {self.context}"


CELLS = (
    Cell("prefill", 1, 2048),
    Cell("decode", 1, 2048),
    Cell("prefill", 1, 8192),
    Cell("decode", 1, 8192),
    Cell("decode", 8, 2048),
    Cell("decode", 32, 2048),
    Cell("decode", 8, 8192),
)
"""Cheapest first, so that a run that is cut short has measured something of every kind."""
QUICK = (Cell("prefill", 1, 256), Cell("decode", 2, 256))


@dataclass(frozen=True)
class Configuration:
    """A peer as it is started. environment: folder of its interpreter. kv: what the runner's `--kv` gets."""

    peer: str
    weights: str
    kv: str
    kv_size: float = 1.0  # bytes of a token over those of a dense 16-bit cache; for planning memory only
    model: str = "directory"  # or the weights of a GGUF file

    @property
    def name(self) -> str:
        return f"{self.peer} {self.weights} / {self.kv}"

    @property
    def module(self) -> str:
        return f"benchmarks.peers.run_{self.peer.replace('-', '_').replace('.', '_')}"

    def memory(self, cell: Cell) -> int:
        """About how many bytes a runner takes, generously."""
        return int(1.5 * GIB + self.kv_size * cell.batch * cell.context * DENSE_TOKEN)


ENVIRONMENTS = {
    "kvfold": ".venv",
    "transformers": ".venv-transformers",
    "vllm": ".venv-vllm",
    "llama.cpp": ".venv-llama-cpp",
    "kvpress": ".venv-peers",
}
KVFOLD_METHODS = {"none": 1.0, "zeroc(bits=4)": 0.3, "zeroc(bits=2)": 0.2}


def configurations(kvfold_weights: list[str]) -> list[Configuration]:
    """All that can be measured; kvfold_weights: precisions that every method of kvfold is measured with."""
    return [
        *(Configuration("kvfold", w, kv, size) for w in kvfold_weights for kv, size in KVFOLD_METHODS.items()),
        Configuration("vllm", "bf16", "bf16"),
        Configuration("vllm", "bf16", "fp8", 0.5),
        Configuration("llama.cpp", "bf16", "f16", model="bf16"),
        Configuration("llama.cpp", "bf16", "q8_0", 0.55, model="bf16"),
        Configuration("llama.cpp", "q8_0", "f16", model="q8_0"),
        Configuration("llama.cpp", "q8_0", "q8_0", 0.55, model="q8_0"),
        Configuration("transformers", "bf16", "bf16", 2.5),  # its cache is copied whenever it grows
        Configuration("kvpress", "bf16", "snapkv(0.5)", 2.5),
    ]


def prompt_length(cell: Cell, new: int) -> int:
    """Tokens of a prompt: what a context leaves for `new` tokens that are measured.

    Engines that mix prompts and new tokens let the first sequences go on while the last prompts are read, a token in
    every step of at most 2048; there is room for those, too.
    """
    if cell.kind == "prefill":
        return cell.context - 1
    reading = cell.batch * cell.context // 2048
    return cell.context - new - reading - reading // 4 - 4
