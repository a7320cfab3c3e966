"""What may still follow a text: exact for regular expressions and grammars, and never a guess."""

import pytest

from penstock_vllm.language import (
    MOST_CHARACTERS,
    MOST_STATES,
    MOST_STEPS,
    MOST_WAITING,
    Grammar,
    Machine,
    Reading,
    UnclearError,
)
from penstock_vllm.notations import grammar, regular_expression

JSON_LIKE = r"""
root ::= object
object ::= "{" ws (pair ("," ws pair)*)? "}" ws   # every object may be followed by white space, the inner ones too
pair ::= "\"" [a-z]+ "\"" ws ":" ws value
value ::= object | [0-9]+ ws | "[" ws (value ("," ws value)*)? "]" ws
ws ::= ([ \t\n] ws)?
"""
LISTS = """
start: item (" " item)* TAIL?
item: /[0-9]+/ | "(" item ")"
TAIL: /\\s/+
"""


def over(language: Grammar, text: str) -> bool:
    """Whether the text is whole, and nothing but white space can follow."""
    reading = Reading(Machine(language))
    reading.feed(text)
    assert reading.catch_up()
    return reading.is_whole and reading.can_only_add_white_space


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"[0-9]{3}\s*", "123", True),
        (r"[0-9]{3}\s*", "123 \n", True),
        (r"[0-9]{3}\s*", "12", False),
        (r"[0-9]+", "1", False),
        (r"[0-9]{1,3}", "12", False),
        (r"[0-9]{1,3}", "123", True),
        (r"[0-9]{3}(\s+[0-9]{3})?", "123", False),
        (r"[0-9]{3}(\s+[0-9]{3})?", "123  456", True),
        (r"[0-9]{3}(\s{40}x)?", "123" + " " * 39, False),
        (r"[0-9]{3}(\s{40}|\s{7})*", "123" + " " * 40, True),
        (r"yes\n*|yes\n*but", "yes\n", False),
        (r"(?:a|b)?(?P<x>c)(?<y>d)$", "cd", True),
        (r"^\d\w\S[^\d]\.?", "1a%x", False),
        (r"^\d\w\S[^\d]\s?", "1a%x", True),
        (r"[\w-]{2} ?", "a-", True),
        (r"[a\]\x41\u0042\-z]{2}\n?", "]-", True),
        (r"\x{1F600}\u{20AC}?\t?", "\U0001f600", False),
        (r"\x{1F600}\u{20AC}?\t?", "\U0001f600€", True),
        (r".{2}\s?", "\n\n", True),
        ("", "", True),
        (r"\s*", "", True),
        (r"a*?b+?\s*", "ab", False),
    ],
)
def test_regular_expressions(pattern: str, text: str, expected: bool) -> None:
    assert over(regular_expression(pattern), text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a":{"b":1}}', True),
        ('{"a":{"b":1}}  \n', True),
        ('{"a":{"b":1} ', False),
        ('{"a":{"b":1}', False),
        ("{}", True),
        ("{ ", False),
    ],
)
def test_a_recursive_grammar_is_known_to_its_depth(text: str, expected: bool) -> None:
    assert over(grammar(JSON_LIKE), text) is expected


@pytest.mark.parametrize(("text", "expected"), [("1", False), ("(1)", False), ("((1)) ", False)])
def test_lark(text: str, expected: bool) -> None:
    assert over(grammar(LISTS), text) is expected


def test_lark_ends() -> None:
    ends = grammar('start: "a" ~ 2 b{1,2} ["z" " "] // twice\n  | "c" WS*\nb: "x" "y"?\nWS: /[ \\n]/\n')
    assert not over(ends, "aaxyxy")
    assert over(ends, "aaxyxyz ")
    assert not over(ends, "aaxy")
    assert over(ends, "c \n")


def test_a_left_recursive_grammar_and_one_that_may_be_empty() -> None:
    sums = grammar('root ::= sum " "*\nsum ::= sum "+" one | one\none ::= "1" | nothing one\nnothing ::= ""')
    assert not over(sums, "1+1")
    assert over(grammar('root ::= a a a " "?\na ::= "x"?'), "xxx")
    assert not over(grammar('root ::= a a a " "?\na ::= "x"?'), "xx")


def test_a_text_that_is_none_of_the_language_is_never_over() -> None:
    assert not over(regular_expression(r"[0-9]{3}\s*"), "abc")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i)a",
        r"(?=a)",
        r"(?<=a)b",
        r"\1",
        r"\bword\b",
        r"\p{L}",
        r"[[:alpha:]]",
        r"[a&&b]",
        r"[]a]",
        r"[z-a]",
        r"a{2",
        r"a{3,2}",
        "(a",
        "a)",
        "[a",
        "a\\",
        "*a",
        r"\x{110000}",
        "(" * 200 + ")" * 200,
        "a" * 200_000,
        f"(a{{1000}}){{{MOST_STATES}}}",
    ],
)
def test_what_engines_may_read_in_another_way_is_not_read(pattern: str) -> None:
    with pytest.raises(UnclearError):
        Machine(regular_expression(pattern))


@pytest.mark.parametrize(
    "source",
    [
        "root ::= other",
        "other ::= [a]",
        'root ::= "a',
        'root ::= ("a"',
        "root ::= <a>",
        "rule = 'a'",
        'root ::= "a"\nroot ::= "b"',
        'root ::= TagDispatch(("a", b))',
        'start: "a"i',
        'start: "a".."z"',
        "start: /a/i",
        'start: a -> b\na: "x"',
        '%ignore " "\nstart: "a"',
        'start[capture]: "a"',
        'start: "a"\nstart: "b"',
    ],
)
def test_a_grammar_that_is_not_certain_is_not_read(source: str) -> None:
    with pytest.raises(UnclearError):
        Machine(grammar(source))


def test_a_long_text_is_read_a_part_at_a_time() -> None:
    reading = Reading(Machine(regular_expression(r"(a|b|c|d)*1\s*")))
    reading.feed("a" * MOST_STEPS)
    parts = 1
    while not reading.catch_up():
        parts += 1
        assert not reading.is_whole
    assert parts > 5
    reading.feed("1 ")
    assert reading.catch_up()
    assert reading.is_whole
    assert reading.can_only_add_white_space


def test_reading_is_bounded() -> None:
    reading = Reading(Machine(regular_expression("(a|b)*")))
    with pytest.raises(UnclearError):
        reading.feed("a" * (MOST_CHARACTERS + 1))
    # So ambiguous that the ways to read it grow with every letter.
    reading = Reading(Machine(grammar('root ::= a*\na ::= a a | "x"')))
    reading.feed("x" * 1000)
    with pytest.raises(UnclearError):
        any(reading.catch_up() for _ in range(1000))


def test_what_is_kept_of_a_text_is_bounded() -> None:
    """A long text of rules that call each other: for every character somebody waits."""
    reading = Reading(Machine(grammar(JSON_LIKE)))
    reading.feed('{"a":' + "[" * (MOST_CHARACTERS // 2))
    with pytest.raises(UnclearError, match=f"more than {MOST_WAITING} items"):
        any(reading.catch_up() for _ in range(MOST_CHARACTERS))
