"""Input that cannot work is told in one sentence, on the rank that is asked, before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold.cli.app import main
from kvfold.errors import KvfoldError, MemoryLimitError, PromptError
from kvfold.parallel.errors import ParallelError
from kvfold.parallel.identity import check_alike
from kvfold.parallel.launch import launched_rank
from kvfold.parallel.loading import ParallelConfig, config_from_json, load
from tests.engine.tiny import Tiny, tokens

from .ranks import Ranks

GetTiny = Callable[[str], Tiny]


def test_prompts_that_can_never_be_served(ranks: Ranks, tiny: GetTiny) -> None:
    model = tiny("llama")
    with ranks.group(model.model, model.statistics, "none", n_pages=32) as group:
        with pytest.raises(ParallelError, match="call prefill first"):
            group.decode(1)
        with pytest.raises(PromptError, match="give at least one token"):
            group.prefill([])
        with pytest.raises(PromptError, match="shorten the prompt"):
            group.prefill(tokens(640, 1))
        with pytest.raises(PromptError, match="token id 128"):
            group.prefill([1, 128])
        with pytest.raises(MemoryLimitError, match="raise kv_memory, add ranks or compress more"):
            group.prefill(tokens(600, 1))
        group.prefill(tokens(100, 1))  # and is none the worse for it
    assert ranks.reports == ["fine"]


def test_two_ranks_hold_what_one_could_not(ranks: Ranks, tiny: GetTiny) -> None:
    model = tiny("llama")
    for count in (1, 2):
        with ranks.group(model.model, model.statistics, "none", ranks=count, n_pages=80) as group:
            if count == 1:
                with pytest.raises(MemoryLimitError):
                    group.prefill(tokens(600, 1))
            else:
                group.prefill(tokens(600, 1))


def test_ranks_of_another_calibration_are_refused_everywhere(ranks: Ranks, tiny: GetTiny) -> None:
    model = tiny("llama")
    message = "rank 2 has calibration 'other' and rank 0 has 'c'; give all ranks the same --calibration file"
    with (
        pytest.raises(ParallelError, match=message),
        ranks.group(model.model, model.statistics, "zeroc(bits=4)", ranks=3, odd="other"),
    ):
        pass
    assert all(message in report for report in ranks.reports)


@pytest.mark.parametrize("what", ["version", "model", "method", "numbers", "exchange"])
def test_ranks_that_differ_say_in_what(what: str) -> None:
    same = dict.fromkeys(("version", "model", "method", "calibration", "numbers", "exchange"), "x")
    check_alike([same, same])
    with pytest.raises(ParallelError, match=f"rank 1 has {what} 'y' and rank 0 has 'x'; .* same"):
        check_alike([same, {**same, what: "y"}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 0}, "give --sequence-parallel 1 or more"),
        ({"variant": "star"}, "choose ulysses or ring"),
        ({"wire_bits": 3}, "choose 16"),
        ({"timeout": 0.0}, "seconds above 0"),
        ({"timeout": float("nan")}, "seconds above 0"),
        ({"backend": "mpi"}, "choose gloo or nccl"),
        ({"kv": "zerok"}, "unknown KV method"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(KvfoldError, match=message):
        ParallelConfig(**{"ranks": 2, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("kv", ["snapkv(budget=64)", "zipcache", "zeroc(bits=3,salient_bits=6)+h2o(budget=64)"])
def test_methods_that_look_at_the_whole_prompt(kv: str, tmp_path: Path) -> None:
    with pytest.raises(ParallelError, match="use none, int8"):
        load(ParallelConfig(2, str(tmp_path), kv))


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() is None
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ParallelError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
        launched_rank()
    for name, value in (("WORLD_SIZE", "1"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ParallelError, match="count ranks from 0"):
        launched_rank()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ParallelError, match="must be numbers"):
        launched_rank()


def test_a_description_of_another_version() -> None:
    config = ParallelConfig(2, kv="none")
    assert config_from_json(config.as_json()) == config
    with pytest.raises(KvfoldError, match="another version"):
        config_from_json('{"ranks": 2, "colour": "red"}')


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--gigabits", "0", "give a number above 0"),
        ("--teraflops", "nan", "give a number above 0"),
        ("--latency", "-1", "give microseconds, 0 or more"),
        ("--tokens", "0", "give 1 or more"),
        ("--workers", "1", "give 2 or more"),
        ("--wire-bits", "9", "choose 16"),
    ],
)
def test_estimates_of_nothing(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parallel", option, value]) == 2
    assert message in capsys.readouterr().err
