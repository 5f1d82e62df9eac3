"""Whether a generated answer is right: SQuAD's exact match and F1."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1.0 where the answer equals one of the right ones after normalisation, else 0.0."""
    return float(normalised(answer) in {normalised(r) for r in right})


def f1(answer: str, right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, against the right answer that it suits best."""
    return max((_f1(normalised(answer).split(), normalised(r).split()) for r in right), default=0.0)


def _f1(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return float(answer == right)
    common = sum((Counter(answer) & Counter(right)).values())
    return 2 * common / (len(answer) + len(right))
