"""Writes a GGUF file with other weights; runs where llama-cpp-python is installed.

python -m benchmarks.peers.convert_gguf IN.gguf OUT.gguf bf16
"""

import ctypes
import sys
from pathlib import Path

import llama_cpp

TYPES = {
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def main(source: str, target: str, weights: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[weights]
    params.allow_requantize = True
    part = Path(f"{target}.part")
    failed = llama_cpp.llama_model_quantize(source.encode(), str(part).encode(), ctypes.byref(params))
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")
    part.rename(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
