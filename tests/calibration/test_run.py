from pathlib import Path

import pytest
import torch

from kvfold import LLM, SamplingParams
from kvfold.calibration.artifact import load_artifact
from kvfold.calibration.capture import Capture
from kvfold.calibration.run import (
    HELD_OUT,
    MIN_TOKENS,
    calibrate,
    calibrate_model,
    default_path,
    find_artifact,
)
from kvfold.calibration.text import Text, default_text, read_text
from kvfold.errors import CalibrationError, ConfigError, PromptError
from kvfold.model.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(tiny_llama, dtype=torch.float32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def words(count: int, model: LoadedModel) -> Text:
    """A text of exactly `count` tokens of the model: its digits do not merge."""
    digits = "".join(str(i * 7919 % 10) for i in range(count))
    assert len(model.tokenizer(digits)["input_ids"]) == count
    return Text(digits, "digits")


def test_calibrated_once_and_used(tiny_llama: Path, tiny_text: Path, tmp_path: Path, cache: Path) -> None:
    result = calibrate(tiny_llama, text=tiny_text, tokens=1500, context=300, out=tmp_path)
    assert result.path.parent == tmp_path
    assert (result.tokens, result.context, result.text) == (1500, 300, tiny_text.name)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    prompt = torch.randint(300, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    perplexities = {}
    for method, calibration in (("none", None), ("zeroc(bits=8)", result.path), ("zeroc(bits=8)", tmp_path)):
        llm = LLM(tiny_llama, kv=method, kv_memory="8MiB", dtype="float32", calibration=calibration)
        output = llm.generate(prompt, params)[0]
        assert len(output.outputs[0].token_ids) == 4
        assert output.prompt_logprobs is not None
        chosen = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        perplexities[method] = sum(chosen) / len(chosen)
    # Of random weights nothing can be compressed well; what must not happen is that pages and maps do not match.
    assert perplexities["zeroc(bits=8)"] == pytest.approx(perplexities["none"], abs=0.05)
    assert not (cache / "calibration").exists()


def test_perplexity_on_file_is_the_model_s_own(model: LoadedModel, tiny_llama: Path, tiny_text: Path) -> None:
    from transformers import AutoModelForCausalLM

    artifact = calibrate_model(model, read_text(tiny_text), tokens=1024, context=256)
    ids = torch.tensor(model.tokenizer(read_text(tiny_text).content)["input_ids"])
    head = ids[: round(len(ids) * (1 - HELD_OUT))]
    windows = torch.stack([head[i * (len(head) // 4) :][:256] for i in range(4)])
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        loss = reference(windows, labels=windows).loss
    assert artifact.header.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


def test_the_same_text_gives_the_same_statistics(model: LoadedModel, tiny_text: Path) -> None:
    one, two = (calibrate_model(model, read_text(tiny_text), tokens=1024, context=256) for _ in range(2))
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_statistics_are_finite_and_held_out_text_was_not_seen(model: LoadedModel, tiny_text: Path) -> None:
    text = read_text(tiny_text)
    artifact = calibrate_model(model, text, tokens=1024, context=256)
    assert all(tensor.isfinite().all() for tensor in artifact.tensors.values())
    ids = torch.tensor(model.tokenizer(text.content)["input_ids"])
    tail = ids[round(len(ids) * (1 - HELD_OUT)) :].unfold(0, 256, 1)
    for window in artifact.tensors["held_out"]:
        assert (tail == window).all(1).any()


@pytest.mark.parametrize(("tokens", "context"), [(1024, 257), (1100, 511), (5000, 512), (1024, 100_000), (None, None)])
def test_odd_contexts_are_served(model: LoadedModel, tokens: int | None, context: int | None) -> None:
    text = words(2000, model)
    header = calibrate_model(model, text, tokens=tokens, context=context).header
    assert header.context == min(context or 2048, 512, model.spec.max_positions)
    assert header.tokens % header.context == 0
    assert 0 < header.tokens <= 1600


def test_the_shortest_text_is_the_one_that_the_message_names(model: LoadedModel) -> None:
    least = round(MIN_TOKENS / (1 - HELD_OUT))
    with pytest.raises(CalibrationError, match=f"needs {least}"):
        calibrate_model(model, words(least - 1, model))
    assert calibrate_model(model, words(least, model)).header.tokens == MIN_TOKENS


@pytest.mark.parametrize(("tokens", "context", "message"), [(10, None, "--tokens 10"), (None, 255, "--context 255")])
def test_settings_that_make_no_sense_are_refused(
    model: LoadedModel, tokens: int | None, context: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate_model(model, words(2000, model), tokens=tokens, context=context)


def test_parts_of_a_text_are_told_apart(model: LoadedModel, tiny_text: Path) -> None:
    text = read_text(tiny_text)
    half = text.part(0.0, 0.5)
    assert half.content == text.content[: round(len(text.content) / 2)]
    paths = {default_path(model, t, None, None) for t in (text, half, text.part(0.5, 1.0))}
    paths |= {default_path(model, text, 2048, None), default_path(model, text, None, 512)}
    assert len(paths) == 5
    assert default_path(model, text.part(0.0, 1.0), None, None) == default_path(model, text, None, None)
    for start, stop in ((0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ConfigError, match="fractions"):
            text.part(start, stop)


def test_unreadable_texts_are_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("empty", b" \n", "is empty"),
        ("binary", b"a\0b", "binary"),
        ("latin", b"caf\xe9", "not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PromptError, match=message):
            read_text(tmp_path / name)
    with pytest.raises(PromptError, match="check the path"):
        read_text(tmp_path / "missing")


def test_the_default_text_is_long_enough() -> None:
    assert len(default_text().content) > 300_000


def test_an_artifact_is_made_once_per_model(
    model: LoadedModel, tiny_text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfold.calibration.run.default_text", lambda: read_text(tiny_text))
    monkeypatch.setattr("kvfold.calibration.run.DEFAULT_TOKENS", 1024)
    path, first = find_artifact(model, None)
    assert path.is_relative_to(cache)
    written = path.stat().st_mtime_ns
    again, second = find_artifact(model, None)
    assert (again, second.header) == (path, first.header)
    assert path.stat().st_mtime_ns == written
    assert load_artifact(path, model.fingerprint).header == first.header


def test_a_folder_must_hold_exactly_one_artifact(
    model: LoadedModel, tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="no calibration"):
        find_artifact(model, tmp_path)
    path = calibrate(tiny_llama, text=tiny_text, tokens=1024, out=tmp_path).path
    assert find_artifact(model, tmp_path)[0] == path
    path.with_name("b.kvfold.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(CalibrationError, match="2 calibrations"):
        find_artifact(model, tmp_path)
    assert find_artifact(model, path)[0] == path


def test_a_sequence_stands_for_any_position(model: LoadedModel) -> None:
    """With RoPE the loss does not depend on where a sequence lies; what is measured of its keys does."""
    tokens = torch.arange(300) % model.spec.vocab
    found = []
    for first in (0, 200):
        capture = Capture(model.decoder, 64, 1)
        found.append((capture.run(tokens, first), capture.moments["key"].gram, capture.moments["value"].gram))
    (near, near_keys, near_values), (far, far_keys, far_values) = found
    assert far == pytest.approx(near, rel=1e-4)
    torch.testing.assert_close(far_values, near_values, rtol=2e-2, atol=2e-2)
    assert (far_keys - near_keys).abs().max() > 0.01 * near_keys.abs().max()
