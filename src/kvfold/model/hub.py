"""Downloading models from the Hugging Face hub into the hub's own cache."""

from pathlib import Path

from kvfold.errors import ModelError

_CONFIG = ("config.json", "generation_config.json")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TOKENIZER = ("tokenizer*", "*.jinja", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
# Copies in subfolders and in other layouts of the same weights.
_IGNORE = ("*/*", "consolidated*")


def download(repo: str) -> Path:
    """Config, weights and tokenizer of a hub repository; raises ModelError if they cannot be had."""
    return _snapshot(repo, (*_CONFIG, *_WEIGHTS, *_TOKENIZER))


def download_config(repo: str) -> Path:
    """The configuration of a hub repository alone; raises ModelError if it cannot be had."""
    return _snapshot(repo, _CONFIG)


def _snapshot(repo: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=list(_IGNORE)))
    except GatedRepoError as error:
        raise ModelError(
            f"the model {repo} is gated: accept its terms on its hub page and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"no model {repo} on the hub (or it is private): check the spelling, or name a local directory"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        # With a copy in its cache the hub's client would have returned that.
        raise ModelError(
            f"the model {repo} is not in the local cache, and the hub cannot be reached (offline?): "
            "connect, or name a local directory"
        ) from error
    except Exception as error:
        # Whatever its HTTP client and its transfer backend raise, which differ from version to version.
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the model {repo} cannot be downloaded ({reason}): try again, or name a local directory"
        ) from error
