"""What is made of cells: ranks, a page that needs nothing from elsewhere, and comparisons."""

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvfold.evaluation.bootstrap import estimate
from kvfold.evaluation.compare import compare
from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.folder import Folder
from kvfold.evaluation.measures import KL, PERPLEXITY
from kvfold.evaluation.plots import check_plots
from kvfold.evaluation.report import write_report
from kvfold.evaluation.wording import told

Made = Callable[..., Folder]
GOOD, CLOSE, BAD = [0.10, 0.12, 0.11, 0.13], [0.10, 0.13, 0.10, 0.14], [0.5, 0.6, 0.7, 0.6]
CELLS = {("good", 4.0): GOOD, ("close", 4.0): CLOSE, ("bad<&>", 4.0): BAD, ("bad<&>", 2.0): BAD}


class Page(HTMLParser):
    """Collects tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_best_and_those_that_may_be_as_good(made: Made) -> None:
    rows = write_report(made("out", CELLS)).rows
    assert [(row.budget, row.family, row.rank) for row in rows] == [
        (2, "bad<&>", "best"),
        (4, "good", "best"),
        (4, "close", "tied"),
        (4, "bad<&>", ""),
    ]
    (best,) = (row for row in rows if row.family == "good")
    assert best.changes["kl"] == estimate(GOOD)
    assert best.bits == pytest.approx(4)
    assert best.compression == pytest.approx(4)


def test_who_held_more_than_the_budget_is_not_ranked(made: Made) -> None:
    folder = made("out", {("greedy", 4.0): GOOD, ("fair", 4.0): BAD})
    (greedy,) = (cell for cell in folder.cells() if cell.family == "greedy")
    folder.save_cell(replace(greedy, records=[replace(r, bytes=2 * r.bytes) for r in greedy.records]))
    ranks = {row.family: row.rank for row in write_report(folder).rows}
    assert ranks == {"greedy": "over", "fair": "best"}


@pytest.mark.parametrize("task", ["text", "needle"])
def test_the_page_needs_nothing_else_and_says_everything(made: Made, task: str) -> None:
    folder = made("out", CELLS, task)
    write_report(folder)
    text = (folder.path / "report.html").read_text("utf-8")
    page = Page(text)
    for _, attributes in page.tags:
        assert not {"href", "action", "srcset"} & set(attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    assert "bad&lt;&amp;&gt;" in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == (1 if task == "text" else 3)  # a heat map for each budget
    for image in images:
        assert len(image["alt"] or "") > 40
        content = base64.b64decode((image["src"] or "").split(",")[1])
        assert content in [path.read_bytes() for path in folder.path.glob("*.png")]
    assert "Query-agnostic" in text
    assert "prefers-color-scheme: dark" in text


def test_a_report_of_nothing_is_refused(made: Made) -> None:
    with pytest.raises(EvaluationError, match="no finished cell"):
        write_report(made("out", {}))


def test_a_missing_matplotlib_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plots()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'kvfold\[bench\]'"):
        check_plots()


def test_comparing_two_folders(made: Made) -> None:
    a = made("a", {("same", 4.0): GOOD, ("x", 4.0): BAD, ("only", 4.0): GOOD})
    b = made("b", {("same", 4.0): GOOD, ("x", 4.0): GOOD})
    found = {(c.a, c.measure.name): c for c in compare(a.path, b.path)}
    assert {name for name, _ in found} == {"same at 4 bits", "x at 4 bits"}
    assert {c.verdict for c in found.values() if c.a == "same at 4 bits"} == {"tied"}
    assert {c.verdict for c in found.values() if c.a == "x at 4 bits"} == {"b"}  # also where more is better
    expected = estimate([g - b for g, b in zip(GOOD, BAD, strict=True)])
    assert found["x at 4 bits", "kl"].change == expected
    back = {(c.a, c.measure.name): c for c in compare(b.path, a.path)}
    assert back["x at 4 bits", "kl"].verdict == "a"
    assert back["x at 4 bits", "kl"].change.mean == -expected.mean


def test_comparing_two_cells_of_different_families(made: Made) -> None:
    folder = made("out", CELLS)
    good, bad = (next(folder.path.glob(f"cells/text-4-{name}-*.json")) for name in ("good", "bad"))
    found = compare(good, bad)
    assert {(c.a, c.b, c.verdict) for c in found} == {("good at 4 bits", "bad<&> at 4 bits", "a")}


def test_what_does_not_match_is_refused(made: Made, tmp_path: Path) -> None:
    a = made("a", {("x", 4.0): GOOD}).path
    for name, more, named in (
        ("model", {"fingerprint": "g"}, "another model"),
        ("seed", {"settings": {"seed": "1"}}, "seed=0"),
        ("aware", {"settings": {"query_aware": "True"}}, "query_aware=False"),
    ):
        with pytest.raises(EvaluationError, match=named):
            compare(a, made(name, {("x", 4.0): GOOD}, **more).path)
    with pytest.raises(EvaluationError, match="in common"):
        compare(a, made("task", {("x", 4.0): GOOD}, "keys").path)
    with pytest.raises(EvaluationError, match="no suite"):
        compare(a, tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(EvaluationError):
        compare(a, tmp_path / "notes.txt")
    other = made("calibrated", {("x", 4.0): GOOD}, settings={"calibration": "abc"}).path
    assert {c.verdict for c in compare(a, other)} == {"tied"}


def test_figures_in_words() -> None:
    assert told(KL, estimate([0.5])) == "0.5000"
    assert told(KL, estimate([0.0, 1.0])) == "0.5000 [0.0000, 1.00]"
    assert told(PERPLEXITY, estimate([0.0953102])) == "+10.00%"
