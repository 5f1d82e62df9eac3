"""A server with a tiny model, shared by the tests that leave it as it was."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.running import RunningServer

METHODS = ("none", "zeroc(bits=4)")


@pytest.fixture(scope="session")
def server_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers keep the tiny model's calibration."""
    return tmp_path_factory.mktemp("server-cache")


@pytest.fixture(scope="session")
def tiny_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with room for the prompts that tools make of almost single bytes: 2,048 positions."""
    directory = tmp_path_factory.mktemp("tiny") / "tiny"
    shutil.copytree(tiny_llama, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return directory


@pytest.fixture(scope="session")
def server(tiny_model: Path, server_cache: Path) -> Iterator[RunningServer]:
    """Dense and compressed lanes. Tests that kill, drain or fill it start their own with `start_server`."""
    options = [part for method in METHODS for part in ("--kv", method)]
    with RunningServer(
        tiny_model, *options, "--kv-memory", "8MiB", "--served-model-name", "tiny", cache=server_cache
    ) as running:
        yield running


@pytest.fixture
def start_server(tiny_model: Path, server_cache: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers with further options; they are stopped after the test."""
    with ExitStack() as stack:

        def start(*options: str, wait: bool = True) -> RunningServer:
            named = ("--served-model-name", "tiny", *options)
            running = RunningServer(tiny_model, *named, cache=server_cache)
            stack.callback(running.stop)
            if wait:
                running.wait_ready()
            return running

        yield start
