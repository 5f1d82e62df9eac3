"""Compiles the kernels: `python -m kvfold.native.build`, or on installation (hatch_build.py).

Each set of instructions is a compilation of its own; which one runs is decided when the library is loaded. OpenMP is
used but not linked: the library takes part in the pool of threads that torch has loaded.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
TARGET = HERE / "_kernels.so"
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# GCC's own headers of vector instructions are not clean.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mbmi2", "-mf16c"]
VNNI = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "vbmi"))]


class BuildError(Exception):
    """There is no compiler, or it failed."""


def units(x86: bool) -> list[tuple[str, list[str]]]:
    """(source, flags) of everything that is compiled."""
    detect = ["-DKVFOLD_X86"] if x86 else []
    once: list[tuple[str, list[str]]] = [("library.cpp", detect)]
    once += [(f"{name}.cpp", []) for name in ("format", "encode", "sealed", "frame")]
    threaded = [(f"{name}.cpp", ["-fopenmp"]) for name in ("work", "staged", "linear", "heads", "program")]
    attention: list[tuple[str, list[str]]] = [("portable.cpp", [])]
    sets: list[list[str]] = [[]]
    if x86:
        sets += [[*AVX2, *_named("Avx2", "avx2")], [*VNNI, *_named("Vnni", "avx512-vnni")]]
        attention += [("portable.cpp", sets[1]), ("vnni.cpp", sets[2])]
        attention += [("vnni.cpp", [*VNNI, "-mavx512bf16", *_named("VnniBf16", "avx512-vnni-bf16")])]
    layers = [(f"{name}_kernels.cpp", flags) for name in ("linear", "heads") for flags in sets]
    return [*once, *threaded, *attention, *layers]


def _named(suffix: str, name: str) -> list[str]:
    """A set of instructions: what its symbols end with, and what users call it."""
    return [f"-DKVFOLD_SET={suffix}", f'-DKVFOLD_NAME="{name}"']


def build(target: Path = TARGET, extra: list[str] | None = None) -> Path:
    """Compiles and links the library, or leaves what there was. extra: flags such as -fsanitize=address.

    Raises BuildError with the compiler's words.
    """
    compiler = _compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    more = extra or []
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        commands = []
        for index, (source, flags) in enumerate(units(x86)):
            objects.append(f"{folder}/{index}.o")
            commands.append(
                [compiler, *COMMON, *QUIET, *flags, *more, "-c", str(HERE / "csrc" / source), "-o", objects[-1]]
            )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = f"{folder}/kernels.so"
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([compiler, "-shared", *more, *objects, *undefined, "-o", linked])
        # In one step, so that no process ever loads half of it.
        fresh = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(linked, fresh)
        fresh.replace(target)
    return target


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise BuildError("there is no C++ compiler; install g++ or clang++, or name one in CXX")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()}")


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"error: {error}")
