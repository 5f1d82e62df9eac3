"""Which steps a profile measures: prompts, decoding batches and both together, some of them kept from the fit."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """`prompts` of `length` tokens are read, while `batch` sequences of `context` tokens decode."""

    prompts: int = 0
    length: int = 0
    batch: int = 0
    context: int = 0
    held_out: bool = False


@dataclass(frozen=True)
class Grid:
    """cases; repetitions of the whole grid; steps: decoding steps that one repetition takes the mean of, or up to
    `most_steps` where work comes back every so many tokens."""

    cases: tuple[Case, ...]
    repetitions: int
    steps: int
    most_steps: int

    def spanning(self, period: int) -> int:
        """Steps for a method that seals or compresses every `period` tokens: whole periods, so that the mean has its
        share of such steps wherever a context's end falls among them. Periods above `most_steps` are not spanned."""
        return self.steps if period > self.most_steps else -(-self.steps // period) * period


def _reading(prompts: int, *lengths: int, held_out: bool = False) -> list[Case]:
    return [Case(prompts, length, held_out=held_out) for length in lengths]


def _decoding(batches: tuple[int, ...], *contexts: int) -> list[Case]:
    return [Case(batch=batch, context=context) for batch in batches for context in contexts]


FULL = Grid(
    (
        *_reading(1, 16, 64, 128, 256, 512, 1536),
        *_reading(2, 256, 512),
        *_reading(4, 64),
        *_reading(1, 96, 384, held_out=True),
        *_reading(3, 200, held_out=True),
        # Small batches one by one: where products take another way with one more row, that is the knee.
        *_decoding((1, 2, 3, 4, 6, 8, 12, 16), 128, 1024),
        *_decoding((1, 4, 8), 2048),
        *_decoding((32,), 128, 512),
        *(Case(batch=b, context=c, held_out=True) for b, c in ((2, 512), (5, 768), (10, 512), (24, 256))),
        *(Case(1, n, b, c, held_out=True) for n, b, c in ((64, 2, 512), (256, 4, 512), (512, 8, 2048))),
    ),
    repetitions=3,
    steps=8,
    most_steps=64,
)
QUICK = Grid(
    (
        *_reading(1, 16, 128, 512, 1024),
        *_reading(4, 128),
        *_reading(1, 256, held_out=True),
        *_decoding((1, 2, 3, 4, 8), 128, 1024),
        Case(batch=6, context=512, held_out=True),
        Case(1, 128, 4, 512, held_out=True),
    ),
    repetitions=2,
    steps=4,
    most_steps=32,
)


def fit_grid(grid: Grid, positions: int) -> Grid:
    """The grid for a model that takes fewer positions: lengths are halved until they fit, and none comes twice."""
    if positions < 4 * grid.most_steps:
        grid = replace(grid, most_steps=grid.steps)
    room = positions - grid.most_steps - 8

    def fitting(tokens: int) -> int:
        while tokens > room:
            tokens //= 2
        return tokens

    cases = [replace(c, length=fitting(c.length), context=fitting(c.context)) for c in grid.cases]
    return replace(grid, cases=tuple({replace(c, held_out=False): c for c in reversed(cases)}.values()))
