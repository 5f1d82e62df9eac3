"""The demo's document: it answers its question and is not what ZeroC was calibrated on."""

import pytest

from kvfold.cli.demo_document import ANSWER, QUESTION, SECTIONS, demo_prompt, documentation
from kvfold.errors import PromptError


def test_the_document_answers_the_question_once() -> None:
    prompt = demo_prompt()
    assert prompt.count(QUESTION) == 1
    for part in ANSWER:
        assert part in prompt
        assert part not in QUESTION


def test_the_document_is_long_and_every_section_says_something() -> None:
    assert 15_000 < len(demo_prompt()) < 40_000
    assert all(len(documentation(section)) > 200 for section in SECTIONS)


def test_no_section_is_calibration_text() -> None:
    topics = pytest.importorskip("pydoc_data.topics").topics
    calibration = "\n".join(topics.values())
    assert not any(documentation(section)[:200] in calibration for section in SECTIONS)


def test_a_python_without_the_module_is_told() -> None:
    with pytest.raises(PromptError, match="full Python"):
        documentation("no_such_module")
