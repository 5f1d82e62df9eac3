"""Names that are easy to tell apart, for things that are to be found again."""

import random

_QUALITIES = (
    "amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow odd proud quiet rapid "
    "silent tidy upright vivid warm young zealous bitter clever distant early frozen golden humble idle jagged "
    "kindly loyal modern noble oval pale"
)
_THINGS = (
    "anchor basket candle desert engine forest garden harbor island jacket kettle ladder meadow needle orchard "
    "pencil quarry river saddle temple umbrella valley window yard zebra bridge castle dolphin eagle falcon "
    "glacier hammer insect jungle kitchen lantern mirror novel ocean pillow"
)


def names(rng: random.Random, count: int) -> list[str]:
    """`count` different names, such as `amber-anchor`; at most 1,600."""
    qualities, things = _QUALITIES.split(), _THINGS.split()
    chosen = rng.sample(range(len(qualities) * len(things)), count)
    return [f"{qualities[i // len(things)]}-{things[i % len(things)]}" for i in chosen]


def number(rng: random.Random) -> str:
    """Seven digits: hardly to be guessed, and no beginning of another."""
    return str(rng.randrange(1_000_000, 10_000_000))
