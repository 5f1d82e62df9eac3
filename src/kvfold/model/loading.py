"""Loading a model: spec, weights, tokenizer and fingerprint, from any kind of source."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvfold.config.progress import SILENT, Progress
from kvfold.errors import ConfigError, ModelError
from kvfold.model.assembly import assemble
from kvfold.model.checkpoint import Checkpoint
from kvfold.model.decoder import Decoder
from kvfold.model.fingerprint import fingerprint
from kvfold.model.hf_config import read_spec, token_ids
from kvfold.model.source import resolve_config, resolve_model
from kvfold.model.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class LoadedModel:
    """A model ready to run. `path` is its directory, `fingerprint` the identity of its weights and config."""

    decoder: Decoder
    spec: ModelSpec
    tokenizer: "PreTrainedTokenizerBase"
    path: Path
    fingerprint: str


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress = SILENT,
) -> LoadedModel:
    """Load a model from a directory, a hub id, a GGUF file or an alias (see `resolve_model`).

    dtype is torch.float32 or torch.bfloat16, whatever the files hold. The end-of-sequence ids of the
    spec include the tokenizer's own. Raises ModelError for every model that cannot be found, read
    or run, ConfigError for another dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype} is not supported: choose float32 or bfloat16")
    path = resolve_model(source, progress)
    spec = read_spec(path)
    tokenizer = load_tokenizer(path)
    stops = spec.eos_token_ids + token_ids(tokenizer.eos_token_id)
    spec = replace(spec, eos_token_ids=tuple(dict.fromkeys(stops)))
    decoder = Decoder(spec, assemble(Checkpoint(path), spec, dtype, torch.device(device)))
    return LoadedModel(decoder, spec, tokenizer, path, fingerprint(path))


def load_spec(source: str | Path, progress: Progress = SILENT) -> ModelSpec:
    """The spec alone: reads (of a hub id: downloads) the configuration, not the weights."""
    return read_spec(resolve_config(source, progress))


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer saved in a model directory; raises ModelError if there is none or it is unreadable."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # transformers and tokenizers raise anything here, bare Exception included.
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"no usable tokenizer in {directory} ({reason}): put the model's tokenizer.json and "
            "tokenizer_config.json next to its weights"
        ) from error
    return tokenizer
