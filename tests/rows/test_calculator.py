"""The calculator: values against Python's own arithmetic on fractions, and what is no expression."""

from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.rows.calculator import ERROR, MAX_DIGITS, MAX_LENGTH, MAX_PLACES, calculate

NUMBERS = st.one_of(
    st.integers(0, 9999).map(str), st.from_regex(r"[0-9]{0,3}\.[0-9]{1,3}", fullmatch=True)
)
# An expression, and the same for Python, whose parser decides what belongs together.
LEAVES = NUMBERS.map(lambda text: (text, f"F('{text}')")) | NUMBERS.map(
    lambda text: (f"{text}%", f"(F('{text}')/100)")
)


def larger(inner: st.SearchStrategy) -> st.SearchStrategy:
    """Expressions of expressions, without brackets that are not written."""

    def join(a: tuple[str, str], sign: str, b: tuple[str, str]) -> tuple[str, str]:
        return f"{a[0]}{sign}{b[0]}", f"{a[1]}{sign.strip()}{b[1]}"

    return st.one_of(
        st.builds(join, inner, st.sampled_from(["+", "-", "*", "/", " + ", " * "]), inner),
        inner.map(lambda pair: (f"({pair[0]})", f"({pair[1]})")),
        inner.map(lambda pair: (f"({pair[0]})%", f"(({pair[1]})/100)")),
        inner.map(lambda pair: (f"-{pair[0]}", f"-{pair[1]}")),
    )


def decimal_of(value: Fraction) -> str:
    """The value as the decimal module rounds and writes it."""
    exact = Context(prec=200)
    quotient = exact.divide(Decimal(value.numerator), Decimal(value.denominator))
    rounded = quotient.quantize(Decimal(10) ** -MAX_PLACES, ROUND_HALF_EVEN, exact)
    if abs(rounded) >= Decimal(10) ** MAX_DIGITS:
        return ERROR
    text = f"{rounded:f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


@pytest.mark.slow
@given(st.recursive(LEAVES, larger, max_leaves=8))
def test_values_are_those_of_python_on_fractions(pair):
    """Precedence and associativity are those of Python's parser, rounding that of `decimal`; only
    a division by zero and a text that is too long have no value.
    """
    text, in_python = pair
    try:
        expected = decimal_of(eval(in_python, {"F": Fraction}))  # noqa: S307
    except ZeroDivisionError:
        expected = ERROR
    assert calculate(text) == (expected if len(text) <= MAX_LENGTH else ERROR)


@given(st.text("0123456789+-*/().% ", max_size=MAX_LENGTH + 5))
def test_any_text_has_an_answer_of_bounded_length(text):
    """A sign, the digits, a point, the places; or the word for an error."""
    found = calculate(text)
    assert found == ERROR or len(found) <= MAX_DIGITS + MAX_PLACES + 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("10-4-3", "3"),
        ("16/4/2", "2"),
        ("1/3", "0.3333"),
        ("2/3", "0.6667"),
        ("0.1+0.2", "0.3"),
        ("-(2-5)", "3"),
        ("20%*50", "10"),
        (".5+.5", "1"),
        ("0.00001", "0"),
        ("-0.00001", "0"),
        ("999999999999999", "999999999999999"),
    ],
)
def test_known_values(text, value):
    """By hand: precedence, from left to right, exact decimals, four places."""
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "1/0", "1/(2-2)", "2+", "*2", "2**3", "6//2", "(1", "1)", "1 2", "1.2.3", "1.", "%",
     "()", "2(3)", "1e3", "x", "٣", "²", "__import__('os')", "999999999999999+1", "1+" * 50 + "1"],
)  # fmt: skip
def test_what_is_no_expression_is_the_fixed_text(text):
    assert calculate(text) == ERROR


def test_the_deepest_nesting_is_no_problem():
    """As many brackets, or signs, as an expression can have characters."""
    n = (MAX_LENGTH - 1) // 2
    assert calculate("(" * n + "7" + ")" * n) == "7"
    assert calculate("(" * MAX_LENGTH) == ERROR
    assert calculate("-" * (MAX_LENGTH - 2) + "7") == "7"
