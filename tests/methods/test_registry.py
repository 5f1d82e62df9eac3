import dataclasses

import pytest

from kvfold.errors import ConfigError
from kvfold.methods.dense import Dense
from kvfold.methods.registry import METHODS, build_method
from kvfold.methods.zeroc import ZeroC


def test_methods_are_built_from_their_strings() -> None:
    assert build_method("none").codec == Dense()
    assert build_method("zeroc").codec == ZeroC(bits=4.0)
    assert build_method("zeroc(bits=3)").codec == ZeroC(bits=3)
    assert build_method("zeroc(rank=8, map=stacked, sinks=0, recent=16)").codec == ZeroC(
        rank=8, map="stacked", sinks=0, recent=16
    )
    assert build_method('zeroc(max_loss=0.01, bits=None, map="optimal")').codec == ZeroC(max_loss=0.01)


def test_each_method_is_known_by_its_own_name() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert dataclasses.is_dataclass(method)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("zerok", "did you mean 'zeroc'"),
        ("ZEROC", "did you mean 'zeroc'"),
        ("quite_other", "known methods: none, zeroc"),
        ("zeroc(bit=4)", "no parameter 'bit'; did you mean 'bits'"),
        ("zeroc(colour=1)", "its parameters: bits, rank, max_loss"),
        ("none(bits=4)", "it takes none"),
        ("none+zeroc(bits=4)", "do not combine: each codes"),
        ("zeroc(bits=True)", "wrong type"),
        ("zeroc(bits=four)", "give float or nothing"),
        ("zeroc(rank=2.5)", "give int or nothing"),
        ("zeroc(rank=True)", "wrong type"),
        ("zeroc(map=3)", "give str"),
        ("zeroc(sinks=4.0)", "give int"),
        ("zeroc(sinks=None)", "wrong type"),
        ("zeroc(bits=17)", "1 to 16"),
        ("zeroc(rank=0)", "out of range"),
        ("zeroc(max_loss=1)", "0.01 allows"),
        ("zeroc(bits=4, rank=8)", "one of bits, rank and max_loss"),
        ("zeroc(map=best)", "choose one of optimal, stacked"),
        ("zeroc(recent=0)", "recent >= 1"),
        ("zeroc(sinks=-1)", "sinks >= 0"),
    ],
)
def test_mistakes_are_named_with_their_remedy(method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(method)
