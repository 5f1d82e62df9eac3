"""StreamingLLM (arXiv 2309.17453): the first tokens and a window of the newest ones."""

from dataclasses import dataclass, replace
from typing import ClassVar

from kvfold.errors import ConfigError
from kvfold.kv.layout import CacheLayout
from kvfold.methods.base import Facts


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """`streaming(window=1024)`: every query sees the first `sinks` tokens and the newest `window` ones.

    A token's position alone says whether it is seen, in the prompt too; so a prompt takes no more memory than an
    answer, and prefixes can be shared.

    Deviation: positions stay those of the text; the paper counts them within the cache. Raises ConfigError for
    values out of range.
    """

    window: int = 1024
    sinks: int = 4

    name: ClassVar[str] = "streaming"
    facts: ClassVar[Facts] = Facts("tokens", "2309.17453", "positions stay those of the text")
    knob: ClassVar[str | None] = "window"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"streaming window={self.window} keeps nothing; choose at least 1 token")
        if self.sinks < 0:
            raise ConfigError(f"streaming sinks={self.sinks} is out of range; choose 0 or more tokens")

    def narrowed(self, layout: CacheLayout) -> CacheLayout:
        """The layout with this window in every layer that has no smaller one."""
        windows = tuple(self.window if w is None else min(w, self.window) for w in layout.windows)
        sunk = tuple(w is None or w > self.window for w in layout.windows)
        sinks = max(layout.sinks, self.sinks)
        # Sinks need a near page; the newest tokens fill it up.
        recent = layout.near.capacity - sinks % layout.near.capacity if layout.exact else layout.recent
        return replace(layout, windows=windows, sunk=sunk, sinks=sinks, recent=recent, exact=False)
