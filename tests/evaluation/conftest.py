"""A small folder of data in the formats of the public sets, and folders of results made up by hand."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfold.evaluation.folder import Folder
from kvfold.evaluation.records import Cell, Manifest, Placement, Record
from kvfold.evaluation.tasks.data import LINES, VARIABLE, WIKITEXT, XQUAD

WORDS = "page head layer code near far token query key value ring seal pool lane step chunk".split()  # noqa: SIM905
SETTINGS = {"context": "256", "samples": "4", "seed": "0", "query_aware": "False", "calibration": "default"}


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with files of a few kilobytes, not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for name, content in ((WIKITEXT, _wikitext(rng)), (LINES, _lines(rng)), (XQUAD, _xquad(rng))):
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(content, "utf-8")
    return folder


@pytest.fixture
def data(data_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """KVFOLD_DATA, set to a copy of `data_files`."""
    folder = tmp_path / "data"
    shutil.copytree(data_files, folder)
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Folder]:
    """`made(name, {(family, bits): [kl of each sample]}, task)`: a folder of results that nothing was run for."""

    def make(name: str, cells: dict[tuple[str, float], list[float]], task: str = "text", **more: Any) -> Folder:
        folder = Folder(tmp_path / name)
        manifest = Manifest("0", "tiny", more.get("fingerprint", "f"), SETTINGS | more.get("settings", {}), {})
        with folder.writing(manifest):
            for (family, bits), losses in cells.items():
                placements = [Placement(family, bits, 256, f"{family}()", planned=bits)]
                records = [_record(i, family, kl, bits) for i, kl in enumerate(losses)]
                dense = [_record(i, "none", 0.0, 16) for i in range(len(losses))]
                folder.save_cell(Cell(family, bits, task, placements, records, dense))
        return folder

    return make


def _record(sample: int, method: str, kl: float, bits: float) -> Record:
    measures = {"kl": kl, "nll": 1 + kl, "agree": 1 - kl, "exact": float(kl < 0.5), "same": float(kl < 0.5)}
    tags = {"depth": (0.0, 0.5, 1.0)[sample % 3]}
    return Record(256, sample, method, measures, "", round(bits * 1000), 16_000, tags)


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=6))


def _wikitext(rng: random.Random) -> str:
    paragraphs = (" . ".join(_sentence(rng) for _ in range(8)) for _ in range(120))
    return "".join(f" = Heading {i} = \n {paragraph} . \n" for i, paragraph in enumerate(paragraphs))


def _lines(rng: random.Random) -> str:
    records = []
    for record in range(3):
        names = [f"{word}-{record}-{rng.choice(WORDS)}" for word in WORDS]
        numbers = rng.sample(range(1000, 50_000), len(names))
        listed = "".join(f"line {n}: REGISTER_CONTENT is <{x}>\n" for n, x in zip(names, numbers, strict=True))
        asked = {"random_idx": [names[5], 5], "expected_number": numbers[5]}
        records.append({**asked, "prompt": f"A record of lines:\n\n{listed}\nNow the record is over."})
    return "".join(json.dumps(record) + "\n" for record in records)


def _xquad(rng: random.Random) -> str:
    articles = []
    for _ in range(6):
        paragraphs = []
        for _ in range(3):
            words = _sentence(rng)
            answer = words.split()[2]
            qas = [{"question": f"What is third in {words[:9]}?", "answers": [{"text": answer}]}]
            paragraphs.append({"context": words + ".", "qas": qas})
        articles.append({"paragraphs": paragraphs})
    return json.dumps({"data": articles})
