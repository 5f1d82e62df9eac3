"""Commands that run a model, end to end, on a tiny random Llama."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvfold.cli.app import main

from .conftest import Kvfold

PROMPTS = ("A page belongs to", "Two requests with the same beginning")


def parsed(kvfold: Kvfold, *arguments: str | Path) -> dict[str, Any]:
    """What the command prints with --json, which has to be one object and nothing else."""
    result = kvfold(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def artifact(kvfold_here: Kvfold, tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of `tiny_llama` on the first half of `tiny_text`."""
    out = tmp_path_factory.mktemp("calibration")
    options = ("--text", tiny_text, "--to", "0.5", "--tokens", "1024", "--context", "256", "--out", out)
    return Path(parsed(kvfold_here, "calibrate", "--model", tiny_llama, *options)["path"])


def test_batch_equals_single_requests(kvfold_here: Kvfold, tiny_llama: Path) -> None:
    common = ("generate", "--model", tiny_llama, "--dtype", "float32", "--max-tokens", "8")
    singles = [parsed(kvfold_here, *common, "--prompt", prompt)["outputs"][0] for prompt in PROMPTS]
    both = parsed(kvfold_here, *common, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1])["outputs"]
    assert [output["token_ids"] for output in both] == [output["token_ids"] for output in singles]


def test_dense_greedy_text_equals_transformers(kvfold_here: Kvfold, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    options = ("--dtype", "float32", "--max-tokens", "8", "--prompt", PROMPTS[0])
    output = parsed(kvfold_here, "generate", "--model", tiny_llama, *options)["outputs"][0]
    assert output["token_ids"] == expected
    assert output["finish_reason"] in ("length", "stop")


def test_chat_wraps_the_prompt_in_the_template(kvfold_here: Kvfold, tiny_llama: Path) -> None:
    options = ("generate", "--model", tiny_llama, "--max-tokens", "1", "--prompt", PROMPTS[0])
    raw = parsed(kvfold_here, *options)["outputs"][0]["prompt_tokens"]
    chat = parsed(kvfold_here, *options, "--chat")["outputs"][0]["prompt_tokens"]
    assert chat > raw


def test_a_context_file_stands_before_every_prompt(kvfold_here: Kvfold, tiny_llama: Path, tiny_text: Path) -> None:
    document = tiny_text.with_name("document")
    document.write_text(tiny_text.read_text(encoding="utf-8")[:600], encoding="utf-8")
    options = ("generate", "--model", tiny_llama, "--max-tokens", "4", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1])
    alone = parsed(kvfold_here, *options)["outputs"]
    for chat in ("--raw", "--chat"):
        more = ("--context-file", document, "--kv", "snapkv(budget=40,compress=context)", chat)
        outputs = parsed(kvfold_here, *options, *more)["outputs"]
        assert all(o["prompt_tokens"] > a["prompt_tokens"] + 50 for o, a in zip(outputs, alone, strict=True))
        assert all(o["kv"]["bytes"] < o["kv"]["dense_bytes"] for o in outputs)


def test_generated_text_is_all_there_is_on_stdout(kvfold: Kvfold, kvfold_here: Kvfold, tiny_llama: Path) -> None:
    options = ("generate", "--model", tiny_llama, "--max-tokens", "8", "--prompt-file", "-")
    result = kvfold(*options, stdin=PROMPTS[0])
    text = parsed(kvfold_here, *options[:-2], "--prompt", PROMPTS[0])["outputs"][0]["text"]
    assert result.returncode == 0, result.stderr
    assert result.stdout == text + "\n"
    assert "compression" in result.stderr


def test_zeroc_holds_fewer_bytes_than_dense(kvfold_here: Kvfold, tiny_llama: Path, artifact: Path) -> None:
    prompt = "Keys and values are held as codes. " * 30
    options = ("generate", "--model", tiny_llama, "--max-tokens", "4", "--prompt", prompt)
    output = parsed(kvfold_here, *options, "--kv", "zeroc(bits=4)", "--calibration", artifact)["outputs"][0]
    assert 0 < output["kv"]["bytes"] < output["kv"]["dense_bytes"]
    assert output["kv"]["compression"] == pytest.approx(output["kv"]["dense_bytes"] / output["kv"]["bytes"])


def test_perplexity_reports_what_it_promises(
    kvfold_here: Kvfold, tiny_llama: Path, tiny_text: Path, artifact: Path
) -> None:
    common = ("eval", "perplexity", "--model", tiny_llama, "--text", tiny_text, "--from", "0.5")
    sizes = ("--window", "480", "--chunk", "64", "--max-tokens", "960", "--dtype", "float32")
    dense = parsed(kvfold_here, *common, *sizes)
    assert dense["perplexity"] == pytest.approx(dense["dense_perplexity"], rel=1e-6)
    report = parsed(kvfold_here, *common, *sizes, "--kv", "zeroc(bits=4)", "--calibration", artifact)
    assert report["dense_perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6)
    assert report["kv_bytes"] < report["dense_kv_bytes"]
    assert report["tokens"] == 2 * 479  # the first token of a window is not predicted
    assert report["compression"] == pytest.approx(report["dense_kv_bytes"] / report["kv_bytes"])
    assert {"bits_per_element", "seconds"} <= set(report)


def test_info_counts_tokens(kvfold_here: Kvfold, tiny_llama: Path) -> None:
    small = parsed(kvfold_here, "info", "--model", tiny_llama, "--memory", "1MiB")
    large = parsed(kvfold_here, "info", "--model", tiny_llama, "--memory", "4MiB")
    assert large["tokens_in_memory"] == 4 * small["tokens_in_memory"] == 4 * 2**20 // small["dense_bytes_per_token"]
    table = kvfold_here("info", "--model", tiny_llama, "--memory", "1MiB")
    assert table.returncode == 0
    assert f"{small['tokens_in_memory']:,}" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "smollm2-153m"), "smollm2-135m"),
        (("--kv", "zerok(bits=4)"), "zeroc"),
        (("--kv", "zeroc(bit=4)"), "bits"),
        (("--kv", "zeroc(bits=40)"), "bits"),
        (("--calibration", "missing.safetensors", "--kv", "zeroc(bits=4)"), "kvfold calibrate"),
        (("--prompt", "x " * 2000), "511"),
        (("--kv-memory", "100"), "kv_memory"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(
    kvfold_here: Kvfold, tiny_llama: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = kvfold_here("generate", "--model", tiny_llama, "--prompt", "x", *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_damaged_artifact_is_refused(kvfold_here: Kvfold, tiny_llama: Path, artifact: Path, tmp_path: Path) -> None:
    content = bytearray(artifact.read_bytes())
    content[-5] ^= 1
    damaged = tmp_path / artifact.name
    damaged.write_bytes(content)
    options = ("--model", tiny_llama, "--prompt", "x", "--kv", "zeroc(bits=4)", "--calibration", damaged)
    result = kvfold_here("generate", *options)
    assert result.returncode == 2
    assert str(damaged) in result.stderr


def test_a_text_too_short_to_calibrate_leaves_nothing(kvfold_here: Kvfold, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    out = tmp_path / "out"
    result = kvfold_here("calibrate", "--model", tiny_llama, "--text", text, "--out", out)
    assert result.returncode == 2, result.stderr
    assert not out.exists() or not list(out.iterdir())


def test_a_search_for_a_loss_shows_what_it_measured(kvfold_here: Kvfold, tiny_llama: Path, artifact: Path) -> None:
    options = ("--model", tiny_llama, "--kv", "zeroc(max_loss=0.5,recent=16)", "--calibration", artifact)
    common = ("generate", *options, "--max-tokens", "1", "--prompt", PROMPTS[0])
    curve = parsed(kvfold_here, *common)["curve"]
    assert [trial["bits"] for trial in curve] == sorted((trial["bits"] for trial in curve), reverse=True)
    assert curve[0]["bits"] == 8
    text = kvfold_here(*common)
    assert all(f"{trial['loss']:+.2%}" in text.stderr for trial in curve)


def test_the_summary_fits_a_terminal_of_80_columns(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["generate", "--model", str(tiny_llama), "--max-tokens", "2", "--prompt", PROMPTS[0]]) == 0
    summary = capsys.readouterr().err
    assert "compression" in summary
    assert max(map(len, summary.splitlines())) <= 80


def test_a_search_takes_windows_as_long_as_the_models_positions(
    kvfold_here: Kvfold, tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    options = ("--text", tiny_text, "--tokens", "1024", "--context", "512", "--out", tmp_path)
    assert parsed(kvfold_here, "calibrate", "--model", tiny_llama, *options)["context"] == 512
    method = ("--kv", "zeroc(max_loss=0.5,recent=16)", "--calibration", tmp_path)
    parsed(kvfold_here, "generate", "--model", tiny_llama, *method, "--max-tokens", "1", "--prompt", PROMPTS[0])


def test_demo_refuses_a_misspelt_method_before_any_work(kvfold_here: Kvfold, tmp_path: Path) -> None:
    result = kvfold_here("demo", "--model", tmp_path, "--kv", "zeroc(bit=4)")
    assert result.returncode == 2
    assert "did you mean 'bits'?" in result.stderr


@pytest.mark.parametrize("parameter", ["sinks", "recent"])
def test_as_many_near_tokens_as_no_machine_holds_are_refused(
    kvfold_here: Kvfold, tiny_llama: Path, parameter: str
) -> None:
    result = kvfold_here("info", "--model", tiny_llama, "--kv", f"zeroc({parameter}={10**20})")
    assert result.returncode == 2
    assert "at most" in result.stderr
