"""Ranks as users start them: by one command, by torchrun's environment; and what happens when one is lost."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvfold import LLM, SamplingParams
from kvfold.cli.app import main
from kvfold.parallel.errors import ParallelError
from kvfold.parallel.launch import local_ranks
from kvfold.parallel.loading import ParallelConfig

pytestmark = pytest.mark.usefixtures("alone")

TEXT = "A page belongs to one sequence, one layer and one head. Keys and values are held as codes. " * 10
WITHIN = 60  # seconds for a lost rank to be noticed; it takes none, but machines are slow


def generate(model: Path, *more: str) -> list[str]:
    options = ["--model", str(model), "--kv", "int8(recent=16)", "--prompt", TEXT, "--max-tokens", "16", "--json"]
    return ["generate", *options, *more]


def followers() -> list[psutil.Process]:
    """Ranks that this process has started."""
    return [each for each in psutil.Process().children() if "kvfold.parallel.follower" in each.cmdline()]


def lose_a_rank(config: ParallelConfig, when: str) -> None:
    with local_ranks(config) as (group, _):
        group.prefill(list(range(1, 200)))
        [other] = followers()
        other.kill()
        group.prefill(list(range(1, 200))) if when == "prefill" else group.decode(7)


def one_worker(model: Path) -> str:
    llm = LLM(model, kv="int8(recent=16)", kv_memory=2**24)
    return llm.generate(TEXT, SamplingParams(max_tokens=16, temperature=0.0))[0].outputs[0].text


def test_one_command_starts_its_ranks(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(tiny_llama, "--sequence-parallel", "2")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["outputs"][0]["text"] == one_worker(tiny_llama)
    wire = answer["wire"]
    assert wire["ranks"] == 2
    assert wire["prefill_bytes"] == sum(wire["prefill_bytes_by_kind"].values()) > 0
    assert wire["decode_bytes"] > 0
    assert min(wire["kv_bytes_by_rank"]) > 0
    assert not followers()


def test_ranks_that_torchrun_started(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    arguments = generate(tiny_llama, "--sequence-parallel", "2", "--parallel", "ulysses")
    code = "import sys; from kvfold.cli.app import main; sys.exit(main())"
    environment = {**os.environ, "RANK": "1"}
    with subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE) as other:
        assert main(arguments) == 0
        assert other.communicate(timeout=WITHIN)[0] == b""
    assert other.returncode == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["text"] == one_worker(tiny_llama)
    assert main([*arguments[:-4], "--sequence-parallel", "3"]) == 2
    assert "WORLD_SIZE is 2 and --sequence-parallel 3; make them the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sequence-parallel", "0"], "give --sequence-parallel 1 or more"),
        (["--sequence-parallel", "2", "--parallel", "star"], "choose ulysses or ring"),
        (["--sequence-parallel", "2", "--wire-bits", "12"], "choose 16"),
        (["--sequence-parallel", "3", "--parallel", "ulysses"], "use the ring variant"),
        (["--sequence-parallel", "2", "--kv", "snapkv(budget=64)"], "for sequence parallelism use none"),
        (["--sequence-parallel", "2", "--context-file", __file__], "put the document into the prompt"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    tiny_llama: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*generate(tiny_llama), *more]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not followers()


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_rank_that_is_killed_ends_the_others(tiny_llama: Path, when: str) -> None:
    config = ParallelConfig(2, str(tiny_llama), "int8(recent=16)", 2**24)
    with pytest.raises(ParallelError, match=r"rank 0 lost another rank .*start all ranks again"):
        lose_a_rank(config, when)
    assert not followers()


def test_followers_end_with_rank_zero(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "tests.parallel.lost", str(tiny_llama)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as first:
        assert first.stdout is not None
        follower = psutil.Process(int(first.stdout.readline()))
        first.kill()
        deadline = time.monotonic() + WITHIN
        while follower.is_running() and follower.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.1)
