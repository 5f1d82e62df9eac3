"""The document of `kvfold demo`: documentation that every Python carries, and a question it answers.

None of it is in the default calibration text, so the demo shows ZeroC on text it was not calibrated on.
"""

import ast
from importlib.util import find_spec

from kvfold.errors import PromptError

SECTIONS = (
    "random",
    "cmd",
    "timeit",
    "sched",
    "unittest",
    "http.cookies",
    "statistics",
    "argparse",
    "difflib:SequenceMatcher",
    "turtle",
)
"""Modules and classes whose documentation makes up the document, about 6,000 tokens of SmolLM2."""

QUESTION = "Who developed the Logo programming language, and in which year?"
ANSWER = ("Seymour Papert", "1966")
"""What a right answer contains."""


def demo_prompt() -> str:
    """The document followed by the question.

    Raises:
        PromptError: this Python carries no documentation of one of the modules.
    """
    document = "\n\n".join(f"# {section}\n\n{documentation(section)}" for section in SECTIONS)
    return f"{document}\n\nQuestion: {QUESTION} Answer from the text above, in one sentence."


def documentation(name: str) -> str:
    """The docstring of a module of the standard library, or of a class in it (`module:class`).

    The source is read and not imported: `turtle` would need a display library.
    """
    module, _, class_name = name.partition(":")
    spec = find_spec(module)
    source = getattr(spec.loader, "get_source", lambda _: None)(module) if spec else None
    if source is None:
        raise PromptError(f"This Python carries no source of {module!r}: run the demo with a full Python.")
    tree: ast.Module | ast.ClassDef = ast.parse(source)
    for node in tree.body if class_name else ():
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            tree = node
    return ast.get_docstring(tree) or ""
