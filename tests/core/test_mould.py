"""A chunk that fits a mould means what its JSON means; what does not fit is left to be read as JSON."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core import engine_stream
from penstock.core.engine_stream import ChatReader
from penstock.core.events import Event, Failed, Text
from penstock.core.mould import mould_of

Json = dict[str, Any]


def chunk(content: str = "word", tokens: int | None = 7, field: str = "content", **changes: Any) -> Json:
    choice = {"index": 0, "delta": {field: content}, "logprobs": None, "finish_reason": None, "token_ids": None}
    usage = None if tokens is None else {"prompt_tokens": 16, "total_tokens": 16 + tokens, "completion_tokens": tokens}
    told = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return {**told, **({} if usage is None else {"usage": usage}), **changes}


def spelled(told: Json, *, spaced: bool = False, escaped: bool = False) -> bytes:
    separators = (", ", ": ") if spaced else (",", ":")
    return json.dumps(told, separators=separators, ensure_ascii=escaped).encode("utf-8", "surrogatepass")


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


@pytest.mark.parametrize("field", ["content", "reasoning", "reasoning_content"])
@pytest.mark.parametrize("tokens", [7, None])
@pytest.mark.parametrize("spaced", [False, True])
def test_the_next_token_fits(field: str, tokens: int | None, spaced: bool) -> None:
    first, then = chunk("a", tokens, field), chunk('"}],x\\', tokens and tokens + 4, field)
    mould = mould_of(spelled(first, spaced=spaced), first)
    assert mould is not None
    assert mould.read(spelled(then, spaced=spaced)) == ('"}],x\\', (tokens or -4) + 4)


def test_openai_counts_in_another_order() -> None:
    first = chunk(usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})
    mould = mould_of(spelled(first), first)
    assert mould is not None
    then = chunk("x", usage={"prompt_tokens": 1, "completion_tokens": 30, "total_tokens": 31})
    assert mould.read(spelled(then)) == ("x", 30)


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": []},
        {"choices": [{"index": 0, "delta": {"content": "a", "role": "assistant"}}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": []}}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}, "news": 1}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}}]},
        {"news": 1},
        {"usage": {"completion_tokens": 7}},
        {"usage": {"completion_tokens": 7, "total_tokens": 9, "delta": {"content": "a"}}},
    ],
)
def test_no_mould_is_taken_of_a_chunk_that_says_more(changes: Json) -> None:
    told = chunk("a", 7, **changes)
    assert mould_of(spelled(told), told) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b'"finish_reason":null', b'"finish_reason":"stop"'),
        lambda data: data.replace(b'"word"', b'"word","role":"user"'),
        lambda data: data.replace(b'"word"', b'"wo"rd"'),
        lambda data: data.replace(b'"word"', b'"wo\nrd"'),
        lambda data: data.replace(b'"word"', b'"\\ud83d"'),
        lambda data: data.replace(b'"completion_tokens":7', b'"completion_tokens":07'),
        lambda data: data.replace(b'"completion_tokens":7', b'"completion_tokens":7.5'),
        lambda data: data.replace(b'"completion_tokens":7', b'"completion_tokens":null'),
        lambda data: data.replace(b'"completion_tokens":7', b'"completion_tokens":' + b"7" * 20),
        lambda data: data.replace(b'"chatcmpl-1"', b'"chatcmpl-2"'),
        lambda data: data[:-1],
        lambda data: data + b"}",
    ],
)
def test_whatever_else_differs_does_not_fit(change: Callable[[bytes], bytes]) -> None:
    told = chunk()
    mould = mould_of(spelled(told), told)
    assert mould is not None
    assert mould.read(change(spelled(told))) is None


texts = st.text(max_size=8) | st.sampled_from(
    ['"', "\\", '"},"logprobs":null', "\ud83d", "\ude00", "👩\u200d", "\n", ""]
)
chunks = st.builds(
    lambda text, more, field, index, finish, spaced, escaped: (text, more, field, index, finish, spaced, escaped),
    texts,
    st.integers(0, 3) | st.none(),
    st.sampled_from(["content", "content", "reasoning", "tool"]),
    st.integers(0, 1),
    st.sampled_from([None, None, None, None, "stop"]),
    st.sampled_from([False, False, False, True]),
    st.sampled_from([False, False, True]),
)


def heard(pieces: list[bytes], most_moulds: int) -> list[Event]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_stream, "_MOST_MOULDS", most_moulds)
        reader = ChatReader(1 << 16, 2)
        return [event for piece in pieces for event in reader.feed(piece)] + reader.close()


@given(st.lists(chunks, max_size=12), st.booleans())
def test_a_reader_with_moulds_hears_what_one_without_hears(said: list[Any], at_once: bool) -> None:
    pieces: list[bytes] = []
    counts = [0, 0]
    for text, more, field, index, finish, spaced, escaped in said:
        counts[index] += more or 0
        told = chunk(text, None if more is None else counts[index], field)
        told["choices"][0] |= {"index": index, "finish_reason": finish}
        pieces.append(event(spelled(told, spaced=spaced, escaped=escaped)))
    if at_once:
        pieces = [b"".join(pieces)]
    assert heard(pieces, 8) == heard(pieces, 0)


def test_a_piece_longer_than_the_limit_is_refused_though_it_fits() -> None:
    reader = ChatReader(400, 1)
    assert [type(one) for one in reader.feed(event(spelled(chunk())))][-1] is Text
    assert [type(one) for one in reader.feed(event(spelled(chunk("x" * 400, 8))))] == [Failed]


def test_a_finished_choice_says_no_more_though_it_fits() -> None:
    reader = ChatReader(1 << 16, 1)
    done = chunk("", 8)
    done["choices"][0]["finish_reason"] = "stop"
    heard_before = [*reader.feed(event(spelled(chunk()))), *reader.feed(event(spelled(done)))]
    assert heard_before
    assert not any(isinstance(one, Text) for one in reader.feed(event(spelled(chunk("late", 9)))))
