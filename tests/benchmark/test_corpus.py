"""Text files and prompt lists."""

import json
from pathlib import Path

import pytest

from kvfold.benchmark.corpus import load_corpus
from kvfold.benchmark.errors import TraceError


def test_the_default_is_there_and_large() -> None:
    corpus = load_corpus(None)
    assert len(corpus.words) > 10_000
    assert corpus.prompts == ()


def test_a_text_file_is_its_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one  two\nthree")
    assert load_corpus(tmp_path / "a.txt").words == ("one", "two", "three")


def test_questions_are_prompts(tmp_path: Path) -> None:
    lines = [{"question_id": 81, "turns": ["first question", "second"]}, {"prompt": "def f():"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert load_corpus(tmp_path / "q.jsonl").prompts == ("first question", "def f():")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "no words"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("q.jsonl", b'{"prompt": "a"}\n{', "line 2"),
        ("q.jsonl", b'{"prompt": 3}', "line 1"),
        ("q.jsonl", b'{"turns": []}', "line 1"),
        ("q.jsonl", b'["a"]', "line 1"),
        ("q.jsonl", b"", "no words"),
    ],
)
def test_what_cannot_be_used_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=message):
        load_corpus(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="--dataset"):
        load_corpus(tmp_path / "none.txt")
