"""The method grammar: round trips, every kind of mistake, and equality."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.config.method import MethodCall, MethodExpression, parse_method
from kvfold.errors import ConfigError

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,12}", fullmatch=True)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)
calls = st.builds(MethodCall, names, st.dictionaries(names, values, max_size=4))
expressions = st.lists(calls, min_size=1, max_size=3).map(lambda items: MethodExpression(tuple(items)))


def typed(expression: MethodExpression) -> list[tuple[str, list[tuple[str, str]]]]:
    """Names, keys and the reprs of values: unlike ==, tells 1 from 1.0 and True."""
    return [(call.name, sorted((k, repr(v)) for k, v in call.arguments.items())) for call in expression.calls]


@given(expressions)
def test_canonical_form_parses_to_the_same_expression(expression: MethodExpression) -> None:
    text = str(expression)
    again = parse_method(text)
    assert again == expression
    assert hash(again) == hash(expression)
    assert typed(again) == typed(expression)
    assert str(again) == text


@given(expressions)
def test_a_canonical_form_survives_being_nested_in_a_string(inner: MethodExpression) -> None:
    outer = MethodExpression((MethodCall("batchmax", {"policy": str(inner), "budget": 512}),))
    policy = parse_method(str(outer)).calls[0].arguments["policy"]
    assert isinstance(policy, str)
    assert parse_method(policy) == inner


@given(st.text(alphabet="ab1.-+e=(),\"'\\ nif", max_size=30))
def test_any_text_gives_an_expression_or_a_config_error(text: str) -> None:
    try:
        expression = parse_method(text)
    except ConfigError:
        return
    assert parse_method(str(expression)) == expression


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", [("none", {})]),
        ("none()", [("none", {})]),
        (
            " zeroc ( bits = 4 ) + snapkv(budget=1024,) ",
            [("zeroc", {"bits": 4}), ("snapkv", {"budget": 1024})],
        ),
        ("zeroc(max_loss=1e-2, map=stacked)", [("zeroc", {"max_loss": 0.01, "map": "stacked"})]),
        ("a(x=True,y=false,z=None,w=-.5)", [("a", {"x": True, "y": False, "z": None, "w": -0.5})]),
        ("batchmax(policy='adakv(mode=\"x\")')", [("batchmax", {"policy": 'adakv(mode="x")'})]),
        ("a(x=infinite)", [("a", {"x": "infinite"})]),
    ],
)
def test_parses(text: str, expected: list[tuple[str, dict[str, object]]]) -> None:
    assert [(call.name, dict(call.arguments)) for call in parse_method(text).calls] == expected


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ("zeroc(bits=4", 6, "not closed"),
        ("zeroc(", 6, "not closed"),
        ("zeroc(bits=4,", 6, "not closed"),
        ("zeroc(bits=4))", 14, "closes nothing"),
        ("zeroc(bits=4, bits=3)", 15, "given twice"),
        ("zeroc(4)", 7, "no parameter name"),
        ("zeroc('x')", 7, "no parameter name"),
        ("zeroc(bits)", 7, "no parameter name"),
        ("zeroc(bits=)", 12, "no value"),
        ("zeroc(bits 4)", 12, "no value"),
        ("zeroc(bits=nan)", 12, "finite"),
        ("zeroc(bits=-inf)", 12, "finite"),
        ("zeroc(bits=1e999)", 12, "too large"),
        ("zeroc(bits=" + "9" * 5000 + ")", 12, "characters"),
        ("zeroc(bits=4b)", 12, "not a value"),
        ("zeroc(bits=4 rank=3)", 14, "cannot follow a value"),
        ("zeroc(,bits=4)", 7, "missing before ','"),
        ("zeroc+", 7, "a method name is missing"),
        ("+zeroc", 1, "not a method name"),
        ("zeroc snapkv", 7, "cannot follow a method"),
        ('a(x="y)', 5, "string is not closed"),
        ("a(x=b(y=1))", 5, "needs quotes"),
        ("a(x=[1])", 5, "not a value"),
    ],
)
def test_mistakes_are_named_with_their_position(text: str, position: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"at character {position}, .*{problem}"):
        parse_method(text)


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_method_names_the_dense_cache(text: str) -> None:
    with pytest.raises(ConfigError, match="use 'none'"):
        parse_method(text)


def test_built_calls_obey_the_grammar() -> None:
    with pytest.raises(ConfigError, match="not a method"):
        MethodCall("zero c")
    with pytest.raises(ConfigError, match="finite"):
        MethodCall("zeroc", {"bits": float("nan")})
    with pytest.raises(ConfigError, match="at least one"):
        MethodExpression(())


def test_arguments_are_read_only_and_order_does_not_count() -> None:
    first, second = parse_method("zeroc(bits=4, sinks=2)"), parse_method("zeroc(sinks=2, bits=4)")
    assert first == second
    assert str(first) == str(second)
    with pytest.raises(TypeError):
        first.calls[0].arguments["bits"] = 3  # type: ignore[index]


def test_expressions_travel_between_processes() -> None:
    expression = parse_method("zeroc(bits=4)+snapkv(budget=1024)")
    assert pickle.loads(pickle.dumps(expression)) == expression
