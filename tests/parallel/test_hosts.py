"""Ranks on two hosts: this network namespace and another one, with a slow, lossy line between them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfold import LLM, SamplingParams
from kvfold.cli.app import main
from kvfold.parallel.interface import interface_towards
from tests.cluster.netns import second_host

pytestmark = pytest.mark.usefixtures("alone")

NAME, HERE, THERE = "kvfranks", "10.213.8.1", "10.213.8.2"
PORTS = {"ring": "29471", "ulysses": "29472"}
KV = "int8(recent=16)"
TEXT = "A page belongs to one sequence, one layer and one head. Keys and values are held as codes. " * 10
CODE = "import sys; from kvfold.cli.app import main; sys.exit(main())"


@pytest.fixture(scope="module")
def inside() -> Iterator[tuple[str, ...]]:
    with second_host(NAME, HERE, THERE) as inside:
        yield inside


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[int]:
    llm = LLM(tiny_llama, kv=KV, kv_memory=2**24)
    return llm.generate(TEXT, SamplingParams(max_tokens=16, temperature=0.0))[0].outputs[0].token_ids


@pytest.mark.parametrize("variant", ["ring", "ulysses"])
def test_a_rank_on_each_of_two_hosts(
    inside: tuple[str, ...],
    expected: list[int],
    tiny_llama: Path,
    variant: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one needs no prompt."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": HERE, "MASTER_PORT": PORTS[variant], "RANK": "0"}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    options = ["generate", "--model", str(tiny_llama), "--kv", KV, "--sequence-parallel", "2", "--parallel", variant]
    command = [*inside, sys.executable, "-c", CODE, *options]
    with subprocess.Popen(command, env={**os.environ, "RANK": "1"}, stdout=subprocess.PIPE) as other:
        assert main([*options, "--prompt", TEXT, "--max-tokens", "16", "--json"]) == 0
        assert other.communicate(timeout=60)[0] == b""
    assert other.returncode == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["outputs"][0]["token_ids"] == expected
    assert answer["wire"]["prefill_bytes"] > 0


def test_the_interface_that_leads_there(inside: tuple[str, ...]) -> None:
    assert interface_towards("127.0.0.1", 1) == "lo"
    assert {interface_towards(address, 1) for address in (HERE, THERE)} == {f"{NAME}0"}
    assert interface_towards("no.such.host.invalid", 1) is None
