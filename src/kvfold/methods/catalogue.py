"""The table of facts about all methods, taken from their code."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from kvfold.config.expression import format_value
from kvfold.methods.batchmax import BatchMax
from kvfold.methods.dense import Dense
from kvfold.methods.policy import Policy
from kvfold.methods.registry import CODECS, METHODS
from kvfold.methods.streaming import Streaming


@dataclass(frozen=True)
class MethodFacts:
    """One method. parameters: as they are written, with defaults. knob: the one that trades quality for bytes.

    needs: what it has to know beside the tokens' own keys and values. prefixes: what requests can share.
    prompt: how it treats a prompt that is read in chunks. query_aware: whether it chooses by what is asked.
    """

    name: str
    kind: str
    saves: str
    parameters: str
    knob: str | None
    needs: str
    prefixes: str
    prompt: str
    query_aware: str
    paper: str | None
    deviations: str


def method_facts() -> list[MethodFacts]:
    """Facts of all methods, codecs first."""
    return [_facts(method) for method in METHODS.values()]


def _facts(method: type[Any]) -> MethodFacts:
    example = method()
    codec = method in CODECS.values()
    staged = not example.positional if codec else isinstance(example, Policy)
    if isinstance(example, Dense):
        prefixes, prompt = "any prefix", "kept as it is"
    elif not staged:
        prefixes, prompt = "any prefix", "compressed while it is read"
    elif isinstance(example, BatchMax):
        prefixes, prompt = "none", "compressed after every chunk"
    else:
        prefixes, prompt = "whole contexts", "compressed when it is read"
    return MethodFacts(
        name=method.name,
        kind="codec" if codec else "window" if isinstance(example, Streaming) else "policy",
        saves=method.facts.saves,
        parameters=_parameters(method),
        knob=method.knob,
        needs=_needs(example, codec),
        prefixes=prefixes,
        prompt=prompt,
        query_aware='with compress="prompt"' if isinstance(example, Policy) and example.query_aware else "no",
        paper=f"https://arxiv.org/abs/{method.facts.paper}" if method.facts.paper else None,
        deviations=method.facts.deviations,
    )


def _needs(example: Any, codec: bool) -> str:
    if codec:
        return "calibration" if example.needs_calibration else "nothing" if example.positional else example.observes
    return example.scores_from if isinstance(example, Policy) else "nothing"


def _parameters(method: type[Any]) -> str:
    shown = []
    for field in fields(method):
        if field.metadata.get("parameter", True) and field.default is not MISSING:
            default = field.default
            shown.append(field.name if default is None else f"{field.name}={format_value(default)}")
    return ", ".join(shown)
