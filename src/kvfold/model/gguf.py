"""GGUF files: converted once to bfloat16 safetensors with a tokenizer, kept in the user's cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from kvfold.config.progress import SILENT, Progress
from kvfold.errors import ModelError
from kvfold.model.cache import cached_directory, check_space
from kvfold.model.families import FAMILIES
from kvfold.model.fingerprint import file_key

_MAGIC = b"GGUF"
# Part of the cache key: raise it when the conversion changes what it writes.
_CONVERSION = 1


def convert_gguf(path: Path, progress: Progress = SILENT) -> Path:
    """The directory with the converted model; converts (some 25 s for 135M parameters) unless cached.

    The cache is keyed by the file's content, so a moved or renamed file is recognised and a replaced one
    converted again. Raises ModelError if the file is missing, corrupt or of an unsupported kind.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        key = file_key(path)
    except OSError as error:
        raise ModelError(f"the GGUF file {path} cannot be read ({error.strerror}): check the path") from error
    if magic != _MAGIC:
        raise ModelError(f"{path} is not a GGUF file: download it again, or name another model")
    name = f"models/gguf{_CONVERSION}-{key[:32]}"
    return cached_directory(name, lambda directory: _convert(path, directory, progress))


def _convert(path: Path, directory: Path, progress: Progress) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with progress.task(f"converting {path.name} (once)", total=4) as advance, _quiet_transformers():
        with _as_model_error(path):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            _check_family(path, config.model_type)
            advance()
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            advance()
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                config=config,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
        advance()
        # Two bytes per parameter, and room for the tokenizer.
        check_space(directory, 2 * sum(p.numel() for p in model.parameters()) + (32 << 20))
        try:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        except SafetensorError as error:
            # What a disk that fills up while writing looks like from safetensors.
            raise OSError(str(error)) from error
        advance()


def _check_family(path: Path, kind: str) -> None:
    """Refuse an unsupported family before the long part of the conversion."""
    if kind.removesuffix("_text") not in FAMILIES:
        raise ModelError(f"{path} is a {kind} model, which is not supported: choose one of {', '.join(FAMILIES)}")


@contextmanager
def _as_model_error(path: Path) -> Iterator[None]:
    """Reading a damaged or unknown GGUF file makes transformers and gguf raise almost anything."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the GGUF file {path} cannot be converted ({reason}): download it again, or use the safetensors "
            "version of the model"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and log lines of transformers, and restore them after."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    # The GGUF reader draws its bar through tqdm itself, out of reach of transformers' own switch.
    bar = reader.tqdm
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
