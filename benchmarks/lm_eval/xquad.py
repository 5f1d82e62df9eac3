"""XQuAD's questions as documents for lm-evaluation-harness, from the folder that KVFOLD_DATA names."""

import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from kvfold.evaluation.tasks.data import XQUAD, read_object

CHOICES = 4


def documents(distractors: int = 4, **_: Any) -> dict[str, Dataset]:
    """One document per question: its paragraph among others, and answers of which one is right.

    distractors: paragraphs of other articles around the one that holds the answer, some 200 tokens each; set by
    `--metadata distractors=N`. Choices are answers to questions about the same paragraph; questions without enough of
    them are left out. Raises EvaluationError where the data is missing.
    """
    articles = read_object(XQUAD)["data"]
    found = list(_documents(articles, distractors))
    random.Random(0).shuffle(found)  # so that the first few are a sample of all
    return {"test": Dataset.from_list(found)}


def _documents(articles: list[dict[str, Any]], distractors: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for index, article in enumerate(articles):
        others = [p["context"] for a in articles[:index] + articles[index + 1 :] for p in a["paragraphs"]]
        for paragraph in article["paragraphs"]:
            answers = {qa["id"]: qa["answers"][0]["text"] for qa in paragraph["qas"]}
            for qa in paragraph["qas"]:
                right = answers[qa["id"]]
                wrong = sorted(set(answers.values()) - {right})
                if len(wrong) < CHOICES - 1:
                    continue
                choices = [right, *rng.sample(wrong, CHOICES - 1)]
                rng.shuffle(choices)
                context = rng.sample(others, min(distractors, len(others)))
                context.insert(rng.randint(0, len(context)), paragraph["context"])
                yield {
                    "context": "\n\n".join(context),
                    "question": qa["question"],
                    "answer": right,
                    "choices": choices,
                    "gold": choices.index(right),
                }


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """SQuAD's measures of an answer: the right words and no others, and how far the two bags of words overlap."""
    said, right = _words(results[0]), _words(doc["answer"])
    common = (Counter(said) & Counter(right)).total()
    return {"exact_match": float(said == right), "f1": 2 * common / (len(said) + len(right)) if common else 0.0}


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
