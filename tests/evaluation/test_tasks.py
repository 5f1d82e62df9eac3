"""Samples: the same for the same seed, no longer than asked, with the answer inside, and a context that is a prefix."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kvfold.errors import ConfigError, ModelError
from kvfold.evaluation.errors import EvaluationError
from kvfold.evaluation.tasks.base import Sample, Task
from kvfold.evaluation.tasks.data import LINES, WIKITEXT, XQUAD
from kvfold.evaluation.tasks.encoder import Encoder
from kvfold.evaluation.tasks.registry import TASKS, build_tasks

LENGTH = 300
ASKED = [name for name in TASKS if name != "text"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest, data: Path) -> Task:
    return build_tasks([request.param], continuation=32)[0]


def test_a_sample_depends_on_seed_length_and_index_alone(task: Task, tokenizer: Any) -> None:
    few, many = (task.samples(tokenizer, LENGTH, count, seed=3) for count in (2, 5))
    assert many[:2] == few
    assert task.samples(tokenizer, LENGTH, 2, seed=4) != few
    assert len({tuple(sample.context) for sample in many}) == 5


def test_contexts_are_as_long_as_they_may_be(task: Task, tokenizer: Any) -> None:
    longest_piece = 90  # tokens of a paragraph, sentence, line or pair in the data
    for sample in task.samples(tokenizer, LENGTH, 5, seed=0):
        assert LENGTH - longest_piece < len(sample.context) <= LENGTH
        assert sample.answer


@pytest.mark.parametrize("name", ASKED)
def test_the_answer_is_in_the_context_and_only_after_the_question(name: str, data: Path, tokenizer: Any) -> None:
    (task,) = build_tasks([name])
    for sample in task.samples(tokenizer, LENGTH, 6, seed=1):
        context, question = (tokenizer.decode(ids) for ids in (sample.context, sample.question))
        answer = sample.answers[0].strip()
        assert tokenizer.decode(sample.answer).strip() == answer
        assert answer in context
        if name != "qa":  # whose answers are words like any other
            assert answer not in question
            asked = (
                question.split(" for ")[-1].split()[0] if name != "lines" else question.split("line ")[1].split("?")[0]
            )
            assert any(asked in line and answer in line for line in context.replace(" .", "\n").splitlines())


@pytest.mark.parametrize("name", ASKED)
def test_the_prompt_is_that_of_the_chat_template_and_the_context_its_beginning(
    name: str, data: Path, tokenizer: Any
) -> None:
    (task,) = build_tasks([name])
    for sample in task.samples(tokenizer, LENGTH, 3, seed=1):
        text = tokenizer.decode(sample.prompt + sample.answer)
        assert text.startswith("<|start|>user\n")
        assert text.count("<|end|>") == text.count("<|start|>assistant\n") == 1
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == sample.prompt + sample.answer
        assert "<|end|>" in tokenizer.decode(sample.question)


def test_a_text_window_goes_on_where_its_context_ends(data: Path, tokenizer: Any) -> None:
    text = (data / WIKITEXT).read_text("utf-8")
    (task,) = build_tasks(["text"], continuation=32)
    samples = task.samples(tokenizer, LENGTH, 5, seed=0)
    for sample in samples:
        assert (len(sample.context), len(sample.question), len(sample.answer)) == (LENGTH, 1, 32)
        place = text.find(tokenizer.decode(sample.prompt + sample.answer))
        assert place >= round(0.6 * len(text))


def test_a_base_model_gets_plain_text(tokenizer: Any) -> None:
    encoder = Encoder(_without_template(tokenizer))
    sample = Sample("A page is 12 .", "What is a page?", "A page is", (" 12",))
    encoded = encoder(sample)
    assert tokenizer.decode(encoded.prompt + encoded.answer) == "A page is 12 .\n\nWhat is a page?\nA page is 12"
    assert "A page is 12 .".startswith(tokenizer.decode(encoded.context))


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Encoder(Slow())


@pytest.mark.parametrize(("name", "file"), [("text", WIKITEXT), ("lines", LINES), ("needle", WIKITEXT), ("qa", XQUAD)])
def test_missing_and_damaged_data_is_named(name: str, file: str, data: Path, tokenizer: Any) -> None:
    (task,) = build_tasks([name])
    (data / file).write_text('{"data": [1]}\n["not what it should be"]')
    with pytest.raises(EvaluationError):
        task.samples(tokenizer, LENGTH, 1, 0)
    (data / file).unlink()
    with pytest.raises(EvaluationError, match=f"{file}.*KVFOLD_DATA"):
        task.samples(tokenizer, LENGTH, 1, 0)


def test_more_windows_than_the_text_has_are_refused(data: Path, tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="lower --samples or --context"):
        build_tasks(["text"])[0].samples(tokenizer, 4000, 50, 0)


@pytest.mark.parametrize("name", ASKED)
def test_a_length_that_holds_nothing_is_refused(name: str, data: Path, tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="longer --context"):
        build_tasks([name])[0].samples(tokenizer, 20, 1, 0)


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'needle'"):
        build_tasks(["nedle"])
    with pytest.raises(ConfigError, match="no task"):
        build_tasks([])


def _without_template(tokenizer: Any) -> Any:
    import copy

    plain = copy.copy(tokenizer)
    plain.chat_template = None
    return plain
