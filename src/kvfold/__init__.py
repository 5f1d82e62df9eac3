"""kvfold: LLM inference with a compressed, paged KV cache.

    from kvfold import LLM, SamplingParams

The names below are loaded on first use, because torch and transformers take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfold.engine.llm import LLM
    from kvfold.engine.outputs import CompletionOutput, RequestOutput
    from kvfold.engine.params import SamplingParams

__version__ = "0.1.0"

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "kvfold.engine.llm",
    "CompletionOutput": "kvfold.engine.outputs",
    "RequestOutput": "kvfold.engine.outputs",
    "SamplingParams": "kvfold.engine.params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
