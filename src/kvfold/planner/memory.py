"""Pages of one simulated worker: those of sequences, and those that only snapshots of prefixes hold."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvfold.planner.prefix import Key

ANSWER = 0
"""The length in the key of a snapshot that holds tokens of an answer: no prompt is known to begin with it."""


@dataclass(eq=False, slots=True)
class Shared:
    """Pages of a prefix that several may hold, beyond those of `parent`; total: with those.

    Holders are sequences, the index of snapshots, and what continues these pages; users are sequences, and what
    continues them and has users. leaf: recent tokens and pages not yet full, of which whoever goes on makes a copy.
    """

    parent: "Shared | None"
    pages: int
    total: int
    leaf: bool
    holders: int = 0
    users: int = 0


@dataclass(eq=False, slots=True)
class Held:
    """What a sequence holds: pages it shares, and its own."""

    shared: Shared | None = None
    own: int = 0

    @property
    def pages(self) -> int:
        return self.own + (self.shared.total if self.shared else 0)


class SimMemory:
    """in_use: pages that are not free; busy: those of them that not only snapshots hold; peak: the most of these."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.in_use = 0
        self.busy = 0
        self.peak = 0
        self._snapshots: OrderedDict[Key, Shared] = OrderedDict()  # least recently used first
        self._lengths: Counter[int] = Counter()
        self._answers = 0

    @property
    def free(self) -> int:
        return self.pages - self.in_use

    @property
    def available(self) -> int:
        """Pages that sequences could take: free ones and those that only snapshots hold."""
        return self.pages - self.busy

    def resize(self, held: Held, pages: int) -> bool:
        """Makes a sequence hold so many pages, of which what it writes is its own; drops snapshots where needed. False,
        and the sequence holds what it held, where that is not enough."""
        while True:
            before = held.shared
            # It goes on behind the full pages of what it shares; none of it is left where it ends.
            after = None if not pages or before is None else before.parent if before.leaf else before
            own = pages - (after.total if after else 0)
            alone = before is not None and before.leaf and before.holders == 1
            if not pages or own - held.own - (before.pages if before and alone else 0) <= self.free:
                break
            if not self._evict():
                return False
        self._hold(after, user=True)
        self._drop(before, user=True)
        self._own(held, own)
        held.shared = after
        self.peak = max(self.peak, self.busy)
        return True

    def snapshot(self, held: Held, full: int, key: Key | None) -> None:
        """Keeps what a sequence holds, `full` pages of it never to be written again, for whoever begins with the same
        tokens (None: these are an answer's, too)."""
        if key is None:
            self._answers += 1
            key = ANSWER, self._answers
        if key not in self._snapshots:
            if held.shared is None or not held.shared.leaf:
                self._share(held, full)
            self._hold(held.shared, user=False)
            assert held.shared is not None, "just shared"
            self._snapshots[key] = held.shared
            self._lengths[key[0]] += 1
        self._snapshots.move_to_end(key)

    def match(self, most: int, prefix: Callable[[int], Key]) -> tuple[Held, int]:
        """What is known of a prompt's first tokens, up to `most` of them, and how many these are."""
        for length in sorted((n for n in self._lengths if ANSWER < n <= most), reverse=True):
            key = prefix(length)
            if key in self._snapshots:
                self._snapshots.move_to_end(key)
                self._hold(self._snapshots[key], user=True)
                return Held(self._snapshots[key]), length
        return Held(), 0

    def forget(self) -> None:
        """Drops all snapshots."""
        while self._evict():
            pass

    def _evict(self) -> bool:
        if not self._snapshots:
            return False
        key, dropped = self._snapshots.popitem(last=False)
        self._lengths[key[0]] -= 1
        if not self._lengths[key[0]]:
            del self._lengths[key[0]]
        self._drop(dropped, user=False)
        return True

    def _share(self, held: Held, full: int) -> None:
        """A sequence's own pages become ones that others may hold, too."""
        before, pages = held.shared, held.pages
        stem = Shared(before, full - (before.total if before else 0), full, leaf=False)
        held.shared = Shared(stem, pages - full, pages, leaf=True)
        self._own(held, 0)
        self._hold(held.shared, user=True)
        self._drop(before, user=True)

    def _own(self, held: Held, pages: int) -> None:
        self.in_use += pages - held.own
        self.busy += pages - held.own
        held.own = pages

    def _hold(self, node: Shared | None, user: bool) -> None:
        """One more holder; the first one holds what the pages continue, too, and the first user uses it."""
        self.in_use += _counted(node, "holders", 1)
        self.busy += _counted(node, "users", 1) if user else 0

    def _drop(self, node: Shared | None, user: bool) -> None:
        """One holder less."""
        self.in_use -= _counted(node, "holders", -1)
        self.busy -= _counted(node, "users", -1) if user else 0


def _counted(node: Shared | None, who: Literal["holders", "users"], by: Literal[1, -1]) -> int:
    """Counts one more or one less, and up from there as long as it is the first or was the last. Returns the pages of
    those."""
    pages, alone = 0, int(by > 0)
    while node is not None:
        count = getattr(node, who) + by
        setattr(node, who, count)
        if count != alone:
            break
        pages += node.pages
        node = node.parent
    return pages
