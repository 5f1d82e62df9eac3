"""Mistakes in policies, codecs and their compositions are named with their remedy when the method string is read."""

import pytest

from kvfold.errors import ConfigError
from kvfold.methods.registry import POLICIES, build_method

DROPPING = ["snapkv", "pyramidkv", "adakv", "kvcompress", "h2o", "tova", "expected", "keydiff", "ems", "batchmax"]


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("0", "keeps nothing; give a number of tokens"),
        ("-5", "keeps nothing; give a number of tokens"),
        ("0.0", "not a share between 0 and 1; give"),
        ("-0.5", "not a share between 0 and 1; give"),
        ("1.5", "not a share between 0 and 1; give"),
        ("1e9", "not a share between 0 and 1; give"),
        ("nan", "give a finite number"),
        ("inf", "give a finite number"),
        ("-inf", "give a finite number"),
        ("1e999", "give a finite number"),
        ("True", "wrong type; give int or float"),
        ("None", "wrong type; give int or float"),
        ("half", "wrong type; give int or float"),
        ('"64"', "wrong type; give int or float"),
    ],
)
def test_budgets(name: str, budget: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(f"{name}(budget={budget})")


@pytest.mark.parametrize("name", sorted(set(DROPPING) - {"h2o", "tova"}))
def test_a_budget_below_the_protected_tokens(name: str) -> None:
    with pytest.raises(ConfigError, match=r"below the 50 tokens that always stay .*; raise budget or lower them"):
        build_method(f"{name}(budget=49,sinks=10,recent=40)")
    build_method(f"{name}(budget=50,sinks=10,recent=40)")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("snapkv(window=0)", "at least 1 query"),
        ("snapkv(kernel=4)", "odd number"),
        ("snapkv(kernel=-1)", "odd number"),
        ("snapkv(pool=median)", "choose avg or max"),
        ("snapkv(sinks=-1)", "sinks >= 0"),
        ("snapkv(recent=-1)", "recent >= 0"),
        ("snapkv(every=0)", "every >= 1"),
        ("snapkv(compress=question)", "choose prompt or context"),
        ("snapkv(budgets=4)", "did you mean 'budget'"),
        ("snapkv(windows=4.0)", "did you mean 'window'"),
        ("pyramidkv(beta=0.5)", "at least 1"),
        ("adakv(alpha=-0.1)", "0 .* to 1"),
        ("adakv(alpha=1.1)", "0 .* to 1"),
        ("expected(future=0)", "at least 1 position"),
        ("ems(similarity=2)", "choose -1 to 1"),
        ("ems(kernel=2)", "odd kernel"),
        ("dbudgetkv(budget=100)", "set threshold instead"),
        ("dbudgetkv(threshold=1.0)", "0.01 allows 1 %"),
        ("dbudgetkv(threshold=-0.1)", "0.01 allows 1 %"),
        ("dbudgetkv(rank=random)", "choose position or attention"),
        ("dbudgetkv(window=0)", "at least 1 query"),
        ("staged(budget=100)", "leave out budget"),
        ("staged(sinks=3)", "leave out budget"),
        ("batchmax(chunk=0)", "at least 1 token"),
        ("batchmax(policy=dbudgetkv)", "choose another policy"),
        ("batchmax(policy=staged)", "choose one of: snapkv"),
        ("batchmax(policy=streaming)", "choose one of: snapkv"),
        ("batchmax(policy=kivi)", "choose one of: snapkv"),
        ("batchmax(policy=snapvk)", "did you mean 'snapkv'"),
        ('batchmax(policy="snapkv+kivi")', "choose one of: snapkv"),
        ('batchmax(policy="snapkv(budget=0)")', "give a number of tokens"),
        ('batchmax(policy="snapkv(sinks=60,recent=60)",budget=100)', "raise budget or lower them"),
        ('batchmax(policy="")', "empty"),
        ("batchmax(inner=snapkv)", "no parameter 'inner'"),
        ("batchmax(policy=batchmax)", "choose one of: snapkv"),
        ("kivi(bits=3)", "choose bits 2 or 4"),
        ("kivi(bits=4,value_bits=8)", "choose bits 2 or 4"),
        ("kivi(value_bits=0)", "choose bits 2 or 4"),
        ("kivi(group=12)", "multiple of 8"),
        ("kivi(group=0)", "multiple of 8"),
        ("kivi(recent=0)", "recent >= 1"),
        ("hack(bits=3)", "choose bits 2, 4 or 8"),
        ("hack(partition=48)", "choose 16, 32, 64 or 128"),
        ("zipcache(hi=3)", "choose hi=1, 2, 4 or 8"),
        ("zipcache(lo=0)", "choose lo=1, 2, 4 or 8"),
        ("zipcache(hi=4,lo=4)", "must be below hi=4"),
        ("zipcache(salient=0.0)", "share between 0 and 1"),
        ("zipcache(salient=1)", "share between 0 and 1"),
        ("zipcache(every=0)", "at least 1 token"),
        ("think(keep=0)", "share between 0 and 1"),
        ("think(keep=1.1)", "share between 0 and 1"),
        ("decoquant(bits=9)", "choose 1 to 8 bits"),
        ("decoquant(bits=0)", "choose 1 to 8 bits"),
        ("int8(bits=8)", "no parameter 'bits'"),
        ("zeroc(rank=8,salient_bits=12)", "goes with bits"),
        ("zeroc(bits=4,salient_bits=4)", "must be above"),
        ("zeroc(bits=4,salient_bits=17)", "at most 16"),
        ("zeroc(bits=4,salient_bits=6,salient=0)", "share between 0 and 1"),
    ],
)
def test_parameters(method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build_method(method)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kivi+int8", "each codes what is kept; use one of them"),
        ("snapkv+h2o", "each chooses what is kept; use one of them"),
        ("snapkv+snapkv(budget=64)", "each chooses what is kept; use one of them"),
        ("snapkv+kivi+zeroc", "each codes what is kept; use one of them"),
        ("streaming+snapkv", "each chooses what is kept; use one of them"),
        ("staged+snapkv", "each chooses what is kept; use one of them"),
        ("batchmax+adakv", "each chooses what is kept; use one of them"),
        ("streaming+zipcache", "join it with a codec such as"),
        ("streaming+think", "join it with a codec such as"),
        ("streaming+decoquant", "join it with a codec such as"),
        ("streaming+zeroc(bits=3,salient_bits=6)", "join it with a codec such as"),
        ("streaming(window=0)", "at least 1 token"),
        ("streaming(sinks=-1)", "0 or more"),
    ],
)
def test_compositions(method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(method)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"streaming"}))
@pytest.mark.parametrize("codec", ["none", "kivi", "zipcache", "think", "hack", "decoquant", "int4", "int8", "zeroc"])
def test_any_policy_goes_with_any_codec_in_any_order(policy: str, codec: str) -> None:
    assert build_method(f"{policy}+{codec}") == build_method(f"{codec}+{policy}")
    assert build_method(f"{policy}+{codec}").staged
