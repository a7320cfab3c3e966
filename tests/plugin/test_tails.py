"""Which grammars a mask of allowed tokens may be believed of."""

import pytest

from penstock_vllm.notations import grammar, regular_expression
from penstock_vllm.tails import mask_tells_the_end


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"[0-9]{3}\s*", True),
        (r"[0-9]+\s*", True),
        (r"[0-9]+", True),
        (r"(yes|no)\n{0,2}", True),
        (r"[a-z ]+", True),
        (r"[0-9]+(,[0-9]+)*\s*", True),
        # A digit is allowed beside the blank, so the mask does not look like an end.
        (r"[0-9]+( [0-9]+)*", True),
        (r"[0-9]{3}(\s+[0-9]{3})?", False),
        (r"New( York)?", False),
        (r"yes\n*|yes\n*but", True),
        (r"yes\n*|yes\n\nbut", False),
        # Hidden behind the first byte of a longer white-space character.
        (r"[0-9]{3}(\s|“x)*", False),
        (r"[0-9]{3}[\s“]*", False),
        (r"[0-9]{3}[\s“a]*", True),
        (r"\w{1,5000}", False),
    ],
)
def test_regular_expressions(pattern: str, expected: bool) -> None:
    assert mask_tells_the_end(regular_expression(pattern)) is expected


def test_a_back_end_that_hides_tokens_is_not_trusted_to_show_text() -> None:
    pattern = regular_expression(r"a( )?(1b)?")
    assert mask_tells_the_end(pattern)
    assert not mask_tells_the_end(pattern, masks_are_whole=False)
    assert mask_tells_the_end(regular_expression(r"[0-9]{3}\s*"), masks_are_whole=False)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('root ::= "{" ws [0-9]+ ws "}" ws\nws ::= [ \\n]*', True),
        ('root ::= "{" ws [0-9]+ ws "}" ws\nws ::= ([ \\n] ws)?', True),
        ('root ::= "a" | "a" " " ws "b"\nws ::= ([ \\n] ws)?', False),
        # Which brace is the last one, only a stack knows.
        ('root ::= object\nobject ::= "{" ws object? ws "}" ws\nws ::= " "*', False),
        ('root ::= list " "*\nlist ::= "(" list? ")"', False),
        ("root ::= other", False),
        ("start: WORD WS?\nWORD: /[a-z]{3}/\nWS: /[ ]+/", True),
    ],
)
def test_grammars(source: str, expected: bool) -> None:
    assert mask_tells_the_end(grammar(source)) is expected
