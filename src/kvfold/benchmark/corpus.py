"""Text that prompts are cut from."""

import json
from dataclasses import dataclass
from pathlib import Path

from kvfold.benchmark.errors import TraceError


@dataclass(frozen=True)
class Corpus:
    """Words to cut prompts from. prompts: whole prompts of a data set that has them (else empty)."""

    name: str
    words: tuple[str, ...]
    prompts: tuple[str, ...] = ()


def load_corpus(path: Path | None) -> Corpus:
    """The text of a file, or by default Python's own language reference, which every installation carries.

    A `.jsonl` file is a list of prompts: objects with `turns` (MT-Bench; the first turn is used) or `prompt`.
    Raises TraceError for what cannot be read or has no words.
    """
    if path is None:
        from pydoc_data.topics import topics

        return Corpus("pydoc_data.topics", tuple(" ".join(topics[name] for name in sorted(topics)).split()))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TraceError(f"cannot read the data set {path}: {error.strerror}; check --dataset") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"the data set {path} is no UTF-8 text; give a text or JSONL file") from error
    prompts = _prompts(path, text) if path.suffix.lower() == ".jsonl" else ()
    words = tuple((" ".join(prompts) if prompts else text).split())
    if not words:
        raise TraceError(f"the data set {path} has no words; give a longer one")
    return Corpus(path.name, words, prompts)


def _prompts(path: Path, text: str) -> tuple[str, ...]:
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        turns = fields.get("turns", [fields.get("prompt")]) if isinstance(fields, dict) else None
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str) or not turns[0].strip():
            raise TraceError(
                f"{path}, line {number}: no JSON object with 'turns' or 'prompt'; correct it or give another --dataset"
            )
        prompts.append(turns[0].strip())
    return tuple(prompts)
