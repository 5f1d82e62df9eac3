"""Perplexity through the cache: transformers' own number for `none`, and what a compressed cache reports."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold.calibration.run import calibrate
from kvfold.errors import CalibrationError, ConfigError, PromptError
from kvfold.evaluation.perplexity import PerplexityReport, evaluate

HALF: dict[str, Any] = {"start": 0.5, "window": 300, "max_tokens": 1000, "dtype": "float32"}


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the first half of the text; tests evaluate on the second."""
    out = tmp_path_factory.mktemp("calibration")
    return calibrate(tiny_llama, text=tiny_text, stop=0.5, tokens=1024, context=256, out=out).path


def test_dense_perplexity_is_that_of_transformers(tiny_llama: Path, tiny_text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tiny_text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(tiny_llama)(text, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    windows = ids[0, :900].view(3, 300)
    with torch.no_grad():
        expected = math.exp(model(windows, labels=windows).loss)
    report = evaluate(tiny_llama, "none", tiny_text, window=300, max_tokens=1000, dtype="float32")
    assert report.perplexity == pytest.approx(expected, rel=1e-4)
    assert report.tokens == 3 * 299
    assert report.loss == 0
    assert report.code_bits == 32


@pytest.mark.parametrize("method", ["none", "zeroc(bits=3,recent=32)"])
def test_chunks_and_memory_do_not_change_it(tiny_llama: Path, tiny_text: Path, calibration: Path, method: str) -> None:
    reports = [
        evaluate(tiny_llama, method, tiny_text, calibration=calibration, chunk=chunk, kv_memory=memory, **HALF)
        for chunk, memory in ((512, None), (128, None), (17, 2**18))
    ]
    for report in reports[1:]:
        assert report.perplexity == pytest.approx(reports[0].perplexity, rel=1e-4)
        assert report.kv_bytes == reports[0].kv_bytes


def test_what_is_reported_fits_together(tiny_llama: Path, tiny_text: Path, calibration: Path) -> None:
    def measured(method: str) -> PerplexityReport:
        return evaluate(tiny_llama, method, tiny_text, calibration=calibration, kv_dtype="bfloat16", **HALF)

    report, dense, fold = measured("zeroc(bits=2,recent=32)"), measured("none"), measured("zeroc(rank=16,recent=32)")
    assert report.dense_perplexity == dense.perplexity == dense.dense_perplexity
    assert report.loss == pytest.approx(report.perplexity / dense.perplexity - 1)
    assert abs(report.loss) > 1e-3 > abs(fold.loss)  # a random model has nothing to lose, but it changes
    assert report.tokens == dense.tokens == 3 * 299
    assert report.dense_kv_bytes == 3 * 300 * 2 * 2 * 16 * 2 * 2  # 2 layers, 2 KV heads, keys and values of 2 bytes
    assert report.compression == pytest.approx(report.dense_kv_bytes / report.kv_bytes)
    assert report.compression > 1.5 > 1 > dense.compression > 0.9  # table entries and page ends are counted
    assert report.bits_per_element == pytest.approx(16 / report.compression)
    assert report.code_bits <= 2 < report.bits_per_element
    assert report.curve == []


def test_a_loss_limit_is_searched_and_kept(tiny_llama: Path, tiny_text: Path, calibration: Path) -> None:
    method = "zeroc(max_loss=0.02,recent=32)"
    report = evaluate(tiny_llama, method, tiny_text, calibration=calibration, **HALF)
    losses = {trial.bits: trial.loss for trial in report.curve}
    assert list(losses) == sorted(losses, reverse=True)
    chosen = min(bits for bits in losses if bits >= report.code_bits)
    assert losses[chosen] <= 0.02 < losses.get(chosen - 0.125, 1)
    again = evaluate(tiny_llama, method, tiny_text, calibration=calibration, **HALF)
    assert again.curve == report.curve
    assert again.perplexity == report.perplexity


def test_the_part_and_the_number_of_tokens_are_those_asked_for(tiny_llama: Path, tiny_text: Path) -> None:
    short = evaluate(tiny_llama, "none", tiny_text, window=300, max_tokens=200, dtype="float32")
    assert short.tokens == 199  # a text below one window is one
    parts = [
        evaluate(tiny_llama, "none", tiny_text, window=100, max_tokens=100, start=start, dtype="float32")
        for start in (0.0, 0.3)
    ]
    assert parts[0].perplexity != parts[1].perplexity


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 1}, ConfigError, "at least 2"),
        ({"max_tokens": 1}, ConfigError, "at least 2"),
        ({"window": 512}, PromptError, "511"),
        ({"start": 0.6, "stop": 0.4}, ConfigError, "from"),
        ({"kv": "zeroc(bits=4)", "calibration": Path("missing")}, CalibrationError, "kvfold calibrate"),
        ({"kv": "zeroc(bits=0)"}, ConfigError, "bits"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    tiny_llama: Path, tiny_text: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"kv": "none", "window": 100} | options
    with pytest.raises(error, match=message):
        evaluate(tiny_llama, text=tiny_text, **arguments)


def test_staged_methods_are_scored_after_what_they_compressed(tiny_llama: Path, tiny_text: Path) -> None:
    everything, little = (
        evaluate(tiny_llama, f"snapkv(budget={budget})", tiny_text, window=400, max_tokens=800, dtype="float32")
        for budget in (400, 40)
    )
    assert everything.tokens == little.tokens == 2 * 200
    assert everything.perplexity == pytest.approx(everything.dense_perplexity, rel=1e-5)
    assert abs(little.loss) > 1e-3
    assert little.compression > 3 * everything.compression
