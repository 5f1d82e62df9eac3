"""The suite on a tiny random model: what is measured, and that an interruption loses nothing."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold.config.progress import SILENT, Advance
from kvfold.errors import ConfigError, PromptError
from kvfold.evaluation.bench import Bench
from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.folder import Folder
from kvfold.evaluation.reading import read
from kvfold.evaluation.settings import SuiteSettings
from kvfold.evaluation.suite import run_suite
from kvfold.evaluation.tasks.data import VARIABLE
from kvfold.evaluation.tasks.registry import TASKS, build_tasks

FAMILIES = ["snapkv(recent=8)", "tova(recent=8),int4(recent=8)"]
SETTINGS: dict[str, Any] = {"lengths": (256,), "samples": 2, "continuation": 16, "dtype": "float32"}


class Stop(Exception):
    """Stands for whatever ends a process."""


class Stopping:
    """Progress that raises after a number of readings."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        def advance(n: int = 1) -> None:
            self.left -= n if description == "measuring" else 0
            if self.left < 0:
                raise Stop

        yield advance


def suite(model: Path, out: Path, *, progress: Any = SILENT, **changes: Any) -> Folder:
    tasks = changes.pop("tasks", ["text", "keys"])
    families, budgets = changes.pop("families", FAMILIES), changes.pop("budgets", [6.0, 12.0])
    return run_suite(model, families, budgets, tasks, out, SuiteSettings(**SETTINGS | changes), progress)


@pytest.fixture(scope="module")
def once(tiny_llama: Path, data_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(data_files))
        return suite(tiny_llama, tmp_path_factory.mktemp("suite") / "out").path


@pytest.fixture
def finished(once: Path, data: Path, tmp_path: Path) -> Folder:
    """A copy of it."""
    shutil.copytree(once, tmp_path / "finished")
    return Folder(tmp_path / "finished")


def test_every_family_has_a_cell_at_every_budget_that_it_fits(finished: Folder) -> None:
    plan = finished.plan()
    assert {p.family for p in plan} == {"snapkv(recent=8)", "tova(recent=8)", "int4(recent=8)"}
    assert {(p.family, p.bits) for p in plan if p.method is None} == {("int4(recent=8)", 6.0)}
    cells = finished.cells()
    assert {(c.family, c.bits) for c in cells} == {(p.family, p.bits) for p in plan if p.method is not None}
    assert {cell.task for cell in cells} == {"text", "keys"}
    for cell in cells:
        assert [r.sample for r in cell.records] == [r.sample for r in cell.dense] == [0, 1]
        for record, dense in zip(cell.records, cell.dense, strict=True):
            assert dense.measures["kl"] == 0
            assert dense.measures["agree"] == 1
            assert record.measures["kl"] > 0
            assert 0 <= record.measures["agree"] <= 1
            assert record.bytes < dense.bytes
            assert record.dense_bytes == dense.dense_bytes


def test_sizes_are_near_the_budget_and_not_above(finished: Folder) -> None:
    for placement in finished.plan():
        assert placement.planned <= placement.bits
        if placement.family != "int4(recent=8)":
            page = 16 * 32 / 256  # bits that a page of every head takes
            assert placement.planned > placement.bits - 1.5 * page


def test_the_largest_budget_loses_least(finished: Folder) -> None:
    of = {(c.task, c.family, c.bits): sum(r.measures["kl"] for r in c.records) for c in finished.cells()}
    assert of["text", "snapkv(recent=8)", 12.0] < of["text", "snapkv(recent=8)", 6.0]


@pytest.mark.parametrize("after", [0, 5, 14])
def test_an_interrupted_run_goes_on_and_measures_nothing_twice(
    tiny_llama: Path, data: Path, tmp_path: Path, finished: Folder, after: int
) -> None:
    out = tmp_path / "interrupted"
    with pytest.raises(Stop):
        suite(tiny_llama, out, progress=Stopping(after))
    journal = {path.name: path.read_bytes() for path in (out / "journal").iterdir()}
    assert sum(content.count(b"\n") for content in journal.values()) == after + 1
    there = Folder(out).cells()
    assert {cell.task for cell in there} == ({"text"} if after == 14 else set())
    assert all(cell in finished.cells() for cell in there)
    suite(tiny_llama, out)
    for name, content in journal.items():
        assert (out / "journal" / name).read_bytes().startswith(content)
    assert Folder(out).cells() == finished.cells()


def test_a_finished_run_computes_nothing(tiny_llama: Path, finished: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "model", property(lambda self: pytest.fail("the model was loaded")))
    before = {path: path.stat().st_mtime_ns for path in finished.path.glob("journal/*")}
    suite(tiny_llama, finished.path)
    assert {path: path.stat().st_mtime_ns for path in finished.path.glob("journal/*")} == before


def test_families_budgets_and_tasks_may_be_added(tiny_llama: Path, finished: Folder) -> None:
    journal = (finished.path / "journal" / "text-256.jsonl").read_bytes()
    suite(tiny_llama, finished.path, families=["h2o(recent=8)"], budgets=[8.0], tasks=["text", "needle"])
    assert (finished.path / "journal" / "text-256.jsonl").read_bytes().startswith(journal)
    added = {(c.task, c.family, c.bits) for c in finished.cells()}
    assert {("text", "h2o(recent=8)", 8.0), ("needle", "h2o(recent=8)", 8.0), ("keys", "tova(recent=8)", 6.0)} <= added


def test_other_settings_and_other_models_are_refused(tiny_llama: Path, finished: Folder, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"seed=0.*seed=1.*another --out"):
        suite(tiny_llama, finished.path, seed=1)
    with pytest.raises(EvaluationError, match=r"query_aware=False.*query_aware=True"):
        suite(tiny_llama, finished.path, query_aware=True)
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_llama.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0, "rope_parameters": None}))
    with pytest.raises(EvaluationError, match="another model"):
        suite(other, finished.path)


@pytest.mark.parametrize(("task", "query_aware"), [*((task, False) for task in TASKS), ("qa", True)])
def test_a_reading_is_what_the_model_says_after_the_prompt(
    tiny_llama: Path, data: Path, task: str, query_aware: bool
) -> None:
    """The dense cache's figures are those of the whole prompt in transformers, in every task."""
    from transformers import AutoModelForCausalLM

    bench = Bench(tiny_llama, SuiteSettings(**SETTINGS), SILENT)
    (made,) = build_tasks([task], continuation=16)
    sample = made.samples(bench.tokenizer, 256, 1, 0)[0]
    engine = bench.engine(["snapkv(compress='context', budget=0.25, recent=8)"], 400)
    dense = read(engine, 0, sample, generate=made.generate, query_aware=query_aware, reference=None)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.tensor([sample.prompt + sample.answer])
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(sample.prompt) - 1 : -1].log_softmax(-1)
    expected = -logprobs.gather(-1, ids[0, len(sample.prompt) :, None])[:, 0]
    torch.testing.assert_close(dense.answer.nll, expected, atol=0.1, rtol=0)  # the cache has 16 bits
    assert dense.logprobs is not None
    other = read(engine, 1, sample, generate=made.generate, query_aware=query_aware, reference=dense.logprobs)
    assert float(other.answer.kl.min()) > 0
    assert other.kv.bytes < dense.kv.bytes
    assert (len(other.text) > 0) == (len(dense.text) > 0) == (made.generate > 0)


def test_what_is_asked_wrongly_is_refused_before_anything_is_made(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes, error, named in (
        ({"families": ["snapkvs"]}, ConfigError, "snapkv"),
        ({"budgets": [0.0]}, ConfigError, "--budgets"),
        ({"budgets": [float("nan")]}, ConfigError, "--budgets"),
        ({"tasks": ["texts"]}, ConfigError, "text"),
        ({"lengths": (8,)}, ConfigError, "--context"),
        ({"samples": 0}, ConfigError, "--samples"),
        ({"lengths": (500,)}, PromptError, "shorter --context"),
    ):
        with pytest.raises(error, match=named):
            suite(tiny_llama, out, **changes)
    assert not out.exists()
