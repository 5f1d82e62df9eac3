"""Tasks by name."""

from collections.abc import Sequence

from kvfold.config.suggest import suggest
from kvfold.errors import ConfigError
from kvfold.evaluation.tasks.base import Task
from kvfold.evaluation.tasks.keys import Keys
from kvfold.evaluation.tasks.lines import Lines
from kvfold.evaluation.tasks.needle import Needle
from kvfold.evaluation.tasks.qa import QA
from kvfold.evaluation.tasks.text import Text

TASKS = (Text.name, Lines.name, Needle.name, Keys.name, QA.name)


def build_tasks(names: Sequence[str], continuation: int = 256) -> list[Task]:
    """The tasks of these names, each once. Raises ConfigError for an unknown one, naming the nearest."""
    made: dict[str, Task] = {t.name: t for t in (Text(continuation), Lines(), Needle(), Keys(), QA())}
    for name in names:
        if name not in made:
            raise ConfigError(f"unknown task {name!r}{suggest(name, made)}; choose among {', '.join(made)}")
    if not names:
        raise ConfigError(f"no task is named; choose among {', '.join(made)}")
    return [made[name] for name in dict.fromkeys(names)]
