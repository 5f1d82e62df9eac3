"""Families: where strings are cut, which number is free, and that the suite says when to compress."""

import pytest

from kvfold.errors import ConfigError
from kvfold.evaluation.families import BITS, PART, SHARE, parse_families
from kvfold.methods.registry import METHODS, build_method


@pytest.mark.parametrize(
    ("text", "member"),
    [
        ("zeroc", 'staged(compress="context")+zeroc(bits=3.0)'),
        ("zeroc(recent=16)", 'staged(compress="context")+zeroc(bits=3.0, recent=16)'),
        ("zipcache(every=50)", 'staged(compress="context", every=50)+zipcache(every=50, salient=0.5)'),
        ("snapkv", 'snapkv(budget=0.5, compress="context")'),
        ("snapkv+zeroc(bits=4)", 'snapkv(budget=0.5, compress="context")+zeroc(bits=4)'),
        ("zeroc+h2o(budget=64)", 'zeroc(bits=3.0)+h2o(budget=64, compress="context")'),
        ('batchmax(policy="adakv")', 'batchmax(budget=0.5, compress="context", policy="adakv")'),
    ],
)
def test_a_family_with_its_number_filled_in(text: str, member: str) -> None:
    (family,) = parse_families([text])
    (form,) = family.forms
    assert form.method({BITS: 3.0, SHARE: 0.5, PART: 0.5}[form.knob or BITS]) == member
    build_method(member)


@pytest.mark.parametrize("text", ["kivi(bits=2)", "zeroc(rank=8)", "zeroc(bits=4)", "snapkv(budget=64)", "int8"])
def test_a_complete_method_has_one_member(text: str) -> None:
    (family,) = parse_families([text])
    (form,) = family.forms
    assert form.knob is None
    assert form.method(0.5) == form.method()
    build_method(form.method())


def test_commas_and_bars_separate_outside_parentheses_and_quotes() -> None:
    families = parse_families(
        ["zeroc(recent=16, sinks=2),kivi(bits=2)|kivi(bits=4)", 'batchmax(policy="ems(every=8)")']
    )
    assert [len(family.forms) for family in families] == [1, 2, 1]
    assert families[1].name == "kivi(bits=2)|kivi(bits=4)"


def test_the_dense_cache_is_no_family_and_others_count_once() -> None:
    assert [family.name for family in parse_families(["none,zeroc", "zeroc()"])] == ["zeroc"]
    with pytest.raises(ConfigError, match="besides the dense cache"):
        parse_families(["none"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("snapkv+zeroc", "budget of snapkv and bits of zeroc free"),
        ('snapkv(compress="prompt")', "--query-aware"),
        ("zerok", "zeroc"),
        ("zeroc(bit=3)", "bits"),
        ("kivi(bits=3)|", "empty"),
        ("kivi+zeroc(bits=4)", "combine"),
    ],
)
def test_what_is_no_family_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_families([text])


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"none", "staged"}))
def test_every_method_is_a_family(name: str) -> None:
    (family,) = parse_families([name])
    (form,) = family.forms
    build_method(form.method(None if form.knob is None else form.knob.high))


def test_all_is_every_method() -> None:
    named = {call.name for family in parse_families(["all"]) for form in family.forms for call in form.expression.calls}
    assert named == set(METHODS) - {"none"}
