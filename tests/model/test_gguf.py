"""GGUF files are converted once, to the model that transformers reads from them."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.errors import ModelError
from kvfold.model.gguf import convert_gguf
from kvfold.model.loading import load_model

VOCAB, HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 300, 32, 4, 2, 48, 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def remains(cache: Path) -> list[Path]:
    """What a failed conversion left behind, apart from the lock."""
    return [path for path in cache.glob("models/*") if path.suffix != ".lock"]


def write_gguf(path: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """A random model with a byte-level BPE vocabulary."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<unk>", "t", "1", "2", *(f"t{i}" for i in range(VOCAB - 6))])
    writer.add_token_types([3, 3, 3, *([1] * (VOCAB - 3))])
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(1)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.2, shape).astype(np.float32))

    add("token_embd.weight", VOCAB, HIDDEN)
    add("output.weight", VOCAB, HIDDEN)
    add("output_norm.weight", HIDDEN)
    kv = HIDDEN * KV_HEADS // HEADS
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", kv, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", kv, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_converted_once_to_what_transformers_reads(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    path = write_gguf(tmp_path / "tiny.gguf")
    loaded = load_model(path, dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).float()
    ids = torch.arange(20) * 7
    with torch.no_grad():
        expected: Tensor = reference(ids[None]).logits[0]
    torch.testing.assert_close(run(loaded.decoder, ids), expected, rtol=1e-4, atol=1e-4)
    assert loaded.spec.eos_token_ids == (1,)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr("kvfold.model.gguf._convert", never)
    moved = path.rename(tmp_path / "renamed.gguf")
    assert convert_gguf(moved) == loaded.path


def test_other_content_is_another_model(tmp_path: Path) -> None:
    one, two = (convert_gguf(write_gguf(tmp_path / f"{seed}.gguf", seed=seed)) for seed in (0, 1))
    assert one != two


def test_progress_is_told_and_nothing_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []

    class Listener:
        @contextmanager
        def task(self, description: str, total: int | None = None) -> Iterator[Any]:
            heard.append(description)
            yield lambda n=1: heard.append("step")

    path = write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    convert_gguf(path, Listener())
    assert heard == ["converting tiny.gguf (once)", *["step"] * 4]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_failing_disk_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(ModelError, match="KVFOLD_CACHE"):
            convert_gguf(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert remains(cache) == []
    assert convert_gguf(path).is_dir()


@pytest.mark.parametrize("content", [b"", b"GG", b"not a gguf file", b"GGUF", b"GGUF" + bytes(100)])
def test_corrupt_files_are_refused(content: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"corrupt\.gguf"):
        convert_gguf(path)
    assert remains(cache) == []


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ModelError, match=r"tiny\.gguf"):
        convert_gguf(path)


def test_unsupported_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"falcon|converted"):
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", architecture="falcon"))
