"""One request on its way through a cluster."""

from dataclasses import dataclass, field

import msgspec

from kvfold.cluster.members import Member
from kvfold.engine.outputs import Logprob
from kvfold.server.messages import Add, Piece, Update


@dataclass(eq=False)
class Job:
    """A request, what its completions have said so far (None: ended), and who works on it.

    reader: who reads the prompt, until its cache has been fetched and its first tokens are known; writer: who gives the
    answer. lost: why its cache did not arrive, until the reader says whether it is wanted. key: its id
    among workers, another one for each attempt, so that nothing old is taken for new.
    """

    add: Add
    said: list[list[int] | None]
    attempt: int = 0
    reader: Member | None = None
    writer: Member | None = None
    fetched: bool = False
    told: bool = False  # what the reader sampled
    lost: str | None = None
    early: list[Update] = field(default_factory=list)  # of the writer, before that
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    cached: int = 0

    @classmethod
    def of(cls, add: Add) -> "Job":
        return cls(add, [[] for _ in range(add.params.n)])

    @property
    def key(self) -> str:
        return f"{self.add.id}#{self.attempt}"

    @property
    def begun(self) -> bool:
        """Whether anything has been said."""
        return any(said is None or said for said in self.said)

    @property
    def tokens(self) -> int:
        """That a worker has to read."""
        return len(self.add.prompt_token_ids) + max(len(said) for said in self.said if said is not None)

    def command(self, handover: bool) -> Add:
        """For a worker that begins, or goes on from what has been said."""
        return msgspec.structs.replace(
            self.add, id=self.key, handover=handover, outputs=self.said if self.begun else []
        )

    def members(self) -> list[Member]:
        """Who works on it."""
        return list(dict.fromkeys(member for member in (self.reader, self.writer) if member is not None))

    def next_attempt(self) -> None:
        """Everything but what has been said begins anew."""
        self.attempt += 1
        self.reader = self.writer = None
        self.fetched = self.told = False
        self.lost = None
        self.early.clear()

    def hear(self, update: Update) -> tuple[Update, bool]:
        """What a client is told of a worker's update, and whether the request goes on in another worker."""
        pieces, moves = [], False
        for piece in update.pieces:
            moved = piece.finish_reason == "handover"
            moves |= moved
            said = self.said[piece.index]
            assert said is not None, "nothing comes after the end"
            said += piece.token_ids
            if piece.finish_reason is not None and not moved:
                self.said[piece.index] = None
            pieces.append(_going_on(piece) if moved else piece)
        if not update.finished:
            return Update(self.add.id, pieces), False
        self.prompt_logprobs = update.prompt_logprobs or self.prompt_logprobs
        self.cached = self.cached or update.cached_prompt_tokens
        if moves:
            return Update(self.add.id, pieces), True
        return Update(self.add.id, pieces, True, update.kv, self.prompt_logprobs, self.cached), False


def _going_on(piece: Piece) -> Piece:
    return msgspec.structs.replace(piece, finish_reason=None)
