"""The reference pages say what the code says."""

from pathlib import Path

import pytest

from support.reference import PAGES, page_as_it_should_be


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_generated_parts_are_those_of_the_code(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("<!-- generated: ") == 1
    assert text == page_as_it_should_be(text), "run `python -m support.reference --write` in tests/"
