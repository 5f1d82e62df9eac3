"""Reading a Hugging Face config.json into a ModelSpec, or saying why the model cannot be run."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.errors import ModelError
from kvfold.model.families import FAMILIES
from kvfold.model.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUPPORTED = ", ".join(FAMILIES)
# What transformers, torch and the family table raise for entries of the wrong type, size or name.
_INVALID = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def read_spec(directory: Path) -> ModelSpec:
    """The spec of the model in `directory`, from its config.json and generation_config.json.

    Raises ModelError if the config is missing, corrupt, inconsistent, or of an unsupported kind.
    """
    raw = read_json(directory / "config.json")
    family = _family(raw, directory)
    if raw.get("quantization_config"):
        raise ModelError(
            f"the model in {directory} has quantised weights, which are not supported: "
            "use its bfloat16, float16 or float32 version"
        )
    config = _text_config(_parse(directory))
    try:
        spec = FAMILIES[family](config)
    except _INVALID as error:
        raise _corrupt(directory, error) from error
    _check_sizes(spec, directory)
    return replace(spec, eos_token_ids=_eos_token_ids(directory, raw, config))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ModelError if it is missing or holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"no {path.name} in {path.parent}: name a model directory as saved by transformers") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object: download it again")
    return content


def token_ids(value: object) -> tuple[int, ...]:
    """Token ids of a config entry that may be missing, one number or a list."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _family(raw: Mapping[str, Any], directory: Path) -> str:
    model_type = raw.get("model_type")
    # Both the text-only and the multimodal Gemma 3 have the same decoder.
    family = "gemma3" if model_type == "gemma3_text" else model_type
    if not isinstance(family, str) or family not in FAMILIES:
        named = f"model type {model_type!r}" if model_type else "a config.json without model_type"
        raise ModelError(f"{directory} has {named}, which is not supported: choose one of {SUPPORTED}")
    return family


def _parse(directory: Path) -> "PreTrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (*_INVALID, StrictDataclassError) as error:
        raise _corrupt(directory, error) from error
    return config


def _text_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    text: PreTrainedConfig | None = getattr(config, "text_config", None)
    return config if text is None else text


def _corrupt(directory: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    return ModelError(f"{directory / 'config.json'} is not a valid config ({reason}): download it again")


def _check_sizes(spec: ModelSpec, directory: Path) -> None:
    sizes = (spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.intermediate, spec.vocab)
    if min(*sizes, spec.max_positions, spec.n_layers) < 1 or spec.heads % spec.kv_heads:
        raise ModelError(
            f"{directory / 'config.json'} has impossible sizes ({spec.n_layers} layers, {spec.heads} heads, "
            f"{spec.kv_heads} KV heads, head_dim {spec.head_dim}): download it again"
        )


def _eos_token_ids(directory: Path, raw: Mapping[str, Any], config: "PreTrainedConfig") -> tuple[int, ...]:
    """generation_config.json decides (instruct models end turns by it), then config.json, then defaults."""
    generation = directory / "generation_config.json"
    stated = token_ids(read_json(generation).get("eos_token_id")) if generation.is_file() else ()
    return stated or token_ids(raw.get("eos_token_id")) or token_ids(config.eos_token_id)
