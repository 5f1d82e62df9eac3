"""Text to calibrate on: a file of the user's, or English text that every Python carries."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kvfold.errors import CalibrationError, ConfigError, PromptError


@dataclass(frozen=True)
class Text:
    content: str
    name: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    def part(self, start: float, stop: float) -> "Text":
        """The characters between two fractions of the text. Raises ConfigError unless 0 <= start < stop <= 1."""
        if not 0 <= start < stop <= 1:
            raise ConfigError(
                f"--from {start:g} --to {stop:g} is no part of a text; give fractions 0 <= from < to <= 1"
            )
        size = len(self.content)
        return Text(self.content[round(start * size) : round(stop * size)], self.name)


def read_text(path: Path) -> Text:
    """A UTF-8 text file. Raises PromptError where it cannot be read as one."""
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text; convert it or choose another file") from error
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    if "\0" in content:
        raise PromptError(f"{path} is a binary file; give a text file")
    if not content.strip():
        raise PromptError(f"{path} is empty; give a file with text")
    return Text(content, path.name)


def default_text() -> Text:
    """The Python language reference's help topics (pydoc_data.topics), about 700 kB of English with code."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CalibrationError("this Python carries no pydoc_data; give a text with --text FILE") from error
    return Text("\n\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics")
