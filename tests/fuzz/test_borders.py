"""Each border holds against its corpus and mutations of it: a few in CI, many in `make soak`.

What breaks a border is written into the corpus, as `found-…`; commit it with the remedy.
"""

import hashlib

import pytest
from hypothesis import HealthCheck, given, settings

from fuzz.borders import BORDERS
from fuzz.mutations import CORPUS, corpus_of, mutations


@pytest.mark.parametrize(
    ("border", "name"), [(border, path.name) for border in BORDERS for path in corpus_of(border)], ids=str
)
def test_the_corpus_finds_nothing(border: str, name: str) -> None:
    BORDERS[border]((CORPUS / border / name).read_bytes())


@pytest.mark.parametrize("border", BORDERS)
def test_mutations_find_nothing(border: str) -> None:
    @settings(suppress_health_check=list(HealthCheck))
    @given(data=mutations(border))
    def hold(data: bytes) -> None:
        try:
            BORDERS[border](data)
        except Exception:
            (CORPUS / border / f"found-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
            raise

    hold()


def test_every_border_has_a_corpus_and_every_corpus_a_border() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(BORDERS)
    assert all(corpus_of(border) for border in BORDERS)
