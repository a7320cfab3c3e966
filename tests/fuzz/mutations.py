"""Inputs made of the corpus: cut, spliced, repeated, with what parsers trip over put into them."""

from pathlib import Path
from typing import Final

from hypothesis import strategies as st

CORPUS: Final = Path(__file__).parent / "corpus"

NASTY: Final = (
    b"\x00",
    b"\xff\xfe",
    b"\xc3",  # half a character
    b"\xed\xa0\x80",  # a surrogate, as no UTF-8 has it
    b"\xef\xbb\xbf",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"\xe2\x80\xa8",  # a line break to JavaScript and to `str.splitlines`, not to SSE
    b'"\\ud800"',
    b"[" * 300,
    b'{"a":' * 300,
    b"1e400",
    b"-0",
    b"9" * 400,
    b"18446744073709551616",
    b"NaN",
    b"null",
    b"true",
    b"{}",
    b'"',
    b"\\u0000",
    b"data: [DONE]\n\n",
    b"event: stream.end\ndata: {}\n\n",
    b"X-Injected: yes\r\n\r\n",
    b"A" * 5000,
    b"!!python/object/apply:os.system ['true']",
    b"&a [*a]",
)


def corpus_of(border: str) -> list[Path]:
    return sorted(path for path in (CORPUS / border).iterdir() if path.is_file())


def mutations(border: str) -> st.SearchStrategy[bytes]:
    return _mutations([path.read_bytes() for path in corpus_of(border)])


@st.composite
def _mutations(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 64)))
        match draw(st.sampled_from(["cut", "byte", "nasty", "splice", "repeat", "any"])):
            case "cut":
                del data[start:end]
            case "byte" if start < len(data):
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "nasty":
                data[start:end] = draw(st.sampled_from(NASTY))
            case "splice":
                other = draw(st.sampled_from(seeds))
                data[start:end] = other[: draw(st.integers(0, len(other)))]
            case "repeat":
                data[start:start] = data[start:end] * draw(st.integers(1, 40))
            case _:
                data[start:end] = draw(st.binary(max_size=16))
    return bytes(data[:100_000])
