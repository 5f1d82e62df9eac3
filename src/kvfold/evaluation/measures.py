"""The figures of one reading, and how each is told and compared."""

from dataclasses import dataclass

from kvfold.evaluation.answers import exact_match, f1
from kvfold.evaluation.reading import Reading
from kvfold.evaluation.tasks.base import EncodedSample
from kvfold.evaluation.tasks.qa import QA
from kvfold.evaluation.tasks.text import Text


@dataclass(frozen=True)
class Measure:
    """A figure of a sample. label: for people; unit: "nats", "share" or "perplexity" (nats, told as the relative rise
    of perplexity); higher: whether more is better; relative: told as a difference to the dense cache, else as it is.
    """

    name: str
    label: str
    unit: str
    higher: bool = False
    relative: bool = True


KL = Measure("kl", "divergence from dense", "nats", relative=False)
AGREE = Measure("agree", "same top token as dense", "share", higher=True, relative=False)
NLL = Measure("nll", "loss of the right answer", "nats")
PERPLEXITY = Measure("nll", "perplexity", "perplexity")
EXACT = Measure("exact", "right answers", "share", higher=True)
F1 = Measure("f1", "F1 of words", "share", higher=True)
SAME = Measure("same", "same answer as dense", "share", higher=True, relative=False)


def measures_of(task: str) -> tuple[Measure, ...]:
    """What is told of a task; the first decides who is best."""
    if task == Text.name:
        return KL, PERPLEXITY, AGREE
    if task == QA.name:
        return KL, NLL, F1, EXACT, SAME
    return KL, NLL, EXACT, SAME


def headline(task: str) -> tuple[Measure, Measure]:
    """The two measures that say most."""
    return KL, {Text.name: PERPLEXITY, QA.name: F1}.get(task, EXACT)


def measure(task: str, sample: EncodedSample, reading: Reading, dense: Reading) -> dict[str, float]:
    """The figures of one sample by measure name; those of the answer's tokens are means over them.

    An answer counts as right where greedy decoding would give exactly its tokens, whatever follows; where text was
    generated, by SQuAD's rules.
    """
    answer = reading.answer
    found = {
        "nll": float(answer.nll.double().mean()),
        "kl": float(answer.kl.double().mean()),
        "agree": float(answer.agree.double().mean()),
        "tokens": float(len(answer.nll)),
    }
    if task == Text.name:
        return found
    if task == QA.name:
        judged = {"exact": exact_match(reading.text, sample.answers), "f1": f1(reading.text, sample.answers)}
        return found | judged | {"same": float(reading.token_ids == dense.token_ids)}
    return found | {"exact": float(answer.right.all()), "same": float(answer.said == dense.answer.said)}
