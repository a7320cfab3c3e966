"""What models, engines and networks do to a stream, drawn by hypothesis."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from random import SystemRandom
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st

from penstock.core.errors import EngineError
from penstock.core.signals import (
    Broke,
    Cancelled,
    ClientBacklog,
    ClientLeft,
    ClockTicked,
    Draining,
    EngineAnswered,
    EngineClosed,
    EngineRefused,
    Signal,
)
from support import chunks
from support.chunks import Json
from support.playbook import FAMILY_NAMES, STARTED

Drawn = TypeVar("Drawn")

_SOAK_FACTOR = 20


def thorough(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples in every run, and twenty times as many in a soak."""
    soaks = settings.get_current_profile_name() == "soak"
    return settings(max_examples=examples * (_SOAK_FACTOR if soaks else 1))


def seeds(in_every_run: int, in_a_soak: int) -> range:
    """The same in every run, others in each soak. What they make is printed where it fails, so none is asked again."""
    if settings.get_current_profile_name() != "soak":
        return range(in_every_run)
    first = SystemRandom().randrange(2**32)
    return range(first, first + in_a_soak)


# --- Calls ----------------------------------------------------------------------------------------

json_texts = st.one_of(
    st.sampled_from(['a"b', "a\\", "}", "{", "]}", "</", "é", "👩‍💻", "\n", "\u2028", '{"name": "x"}', "\\u0041"]),
    st.text(st.characters(codec="utf-8"), max_size=6),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | json_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_texts, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
argument_objects = st.dictionaries(json_texts, json_values, max_size=3)


@st.composite
def hermes_bodies(draw: st.DrawFn, name: str, arguments: Json) -> str:
    """What stands between the markers of one call: any order, any space, any escaping."""
    key = draw(st.sampled_from(["arguments", "arguments", "parameters"]))
    parts = {"name": name, key: arguments}
    if draw(st.booleans()):
        parts = {key: arguments, "name": name}
    if draw(st.integers(0, 4)) == 0:
        parts["id"] = "x"
    separators = draw(st.sampled_from([(", ", ": "), (",", ":"), (" ,\n", " : ")]))
    body = json.dumps(parts, ensure_ascii=draw(st.booleans()), separators=separators)
    before, after = draw(st.tuples(*[st.sampled_from(["", "\n", "  \n"])] * 2))
    return f"{before}{body}{after}"


@st.composite
def hermes_calls(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from(["f", "g", "get_weather"]))
    body = draw(hermes_bodies(name, draw(argument_objects)))
    return f"<tool_call>{body}</tool_call>"


# --- Text -----------------------------------------------------------------------------------------

# Characters that are easily cut: combining, joined, doubled, wide, and those that JSON escapes.
CLUSTERS = (
    "e\u0301",
    "👩‍💻",
    "👨‍👩‍👧",
    "🇩🇪",
    "🇫🇷🇯🇵",
    "👍🏽",
    "漢字",
    "اللغة",
    "นี้",
    "\u200d",
    "🙂",
    '"',
    "\\",
    "\u2028",
    "\x00",
)
SPACES = ("\n", "\n\n", " ", "\t", "   ", "\u3000", " " * 255, " " * 257)
MARKERS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "[THINK]",
    "[/THINK]",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "§§",
    "§!",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<function=",
    "<function=f>",
    "</function>",
    "<parameter=a>",
    "</parameter>",
    "<|python_tag|>",
    '{"name"',
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<｜DSML｜tool_calls>",
    '<｜DSML｜invoke name="f">',
    '<｜DSML｜parameter name="a" string="false">',
    "</｜DSML｜parameter>",
    "</｜DSML｜invoke>",
)
HALVES = ("<thi", "</thin", "<tool_cal", "</tool_", "<", "</", "[", "[/TH", "<|", "<|chan", "§", "STO", "ST")
WORDS = ("Hello", " world", "a", "1", "STOP", "assistant", "analysis", "commentary", "final", "to=functions.f ", "{}")

families = st.sampled_from(FAMILY_NAMES)
policies = st.sampled_from(["separate", "hide", "inline"])

fragments = st.one_of(
    st.sampled_from(MARKERS),
    st.sampled_from(HALVES),
    st.sampled_from(WORDS),
    st.sampled_from(CLUSTERS),
    st.sampled_from(SPACES),
    hermes_calls(),
    st.text(max_size=5).filter(lambda text: not any("\ud800" <= character <= "\udfff" for character in text)),
)
model_texts = st.lists(fragments, max_size=12).map("".join)


@st.composite
def pieces_of(draw: st.DrawFn, text: str) -> list[str]:
    """`text` as an engine may cut it: every character alone, anywhere, or not at all."""
    if len(text) < 2:
        return [text]
    return cut(text, draw(cuts(len(text))))


def cuts(length: int) -> st.SearchStrategy[Sequence[int]]:
    """Where to cut: everywhere, every few characters or bytes, or in a few places."""
    positions = st.integers(1, max(1, length - 1))
    return st.one_of(
        st.just(range(1, length)),
        st.integers(2, 9).map(lambda size: range(size, length, size)),
        st.lists(positions, max_size=20, unique=True).map(sorted),
    )


def cut(whole: str, positions: Sequence[int]) -> list[str]:
    return [whole[start:end] for start, end in pairwise([0, *positions, len(whole)])]


# --- Bytes ----------------------------------------------------------------------------------------

_HEAD = json.dumps(chunks.HEAD).encode()[1:-1] + b", "
line_ends = st.sampled_from(["\n", "\r\n", "\r"])


@st.composite
def spelled(draw: st.DrawFn, frames: Sequence[bytes]) -> bytes:
    """The same events with other line ends, comments, a mark at the start and data on several lines."""
    end = draw(line_ends).encode()
    out = [draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))]
    for number, frame in enumerate(frames):
        if draw(st.integers(0, 5)) == 0:
            out.append(
                draw(st.sampled_from([b": keep-alive", b":", b"retry: 5", b"event: x", b"id: 7", b"unknown"])) + end
            )
        data = frame.removeprefix(b"data: ").removesuffix(b"\n\n")
        if number:  # said once is enough, and fewer bytes are cut faster
            data = data.replace(_HEAD, b"", 1).replace(b'"logprobs": null, "finish_reason": null', b'"x": null', 1)
        if draw(st.integers(0, 5)) == 0:  # between two tokens of the JSON a line may end
            data = data.replace(b'{"index"', end + b'data: {"index"', 1)
        out.append(draw(st.sampled_from([b"data: ", b"data:"])) + data + end + end)
    return b"".join(out)


# --- What engines say -----------------------------------------------------------------------------

delta_texts = st.lists(fragments, max_size=4).map("".join)
tokens = st.none() | st.integers(0, 50)


@st.composite
def chunks_of_choice(draw: st.DrawFn, choice: int) -> bytes:
    """One well-formed chunk of a choice, as engines of all kinds send them."""
    more: Json = {"tokens": draw(tokens), "choice": choice}
    if draw(st.integers(0, 9)) == 0:
        more["logprobs"] = {"content": [{"token": "t", "logprob": -1.0}]}
    if draw(st.integers(0, 9)) == 0:
        more["token_ids"] = [draw(st.integers(0, 9))]
    if draw(st.integers(0, 9)) == 0:
        more["matched"] = draw(json_values)
    text = draw(delta_texts)
    match draw(st.sampled_from(["content"] * 4 + ["reasoning", "reasoning", "refusal", "role", "tool", "tool"])):
        case "tool":
            return draw(tool_chunks(more))
        case "role":
            return chunks.spoken({"role": "assistant", "content": text}, **more)
        case field:
            return chunks.spoken({field: text}, **more)


@st.composite
def tool_chunks(draw: st.DrawFn, more: Json) -> bytes:
    return chunks.tool(
        draw(st.integers(0, 2)),
        call_id=draw(st.sampled_from([None, None, None, "c1", "c2", "c3"])),
        name=draw(st.sampled_from([None, None, "f", "g", "unknown"])),
        arguments=draw(
            st.sampled_from([None, "", "{", "}", "{}", '{"a":', "1", '"\ud83d', '\ude00"', " ", {}, {"a": 1}])
        ),
        **more,
    )


@st.composite
def streams(draw: st.DrawFn, choices: int = 2) -> list[bytes]:
    """The frames of one stream that ends well, or nearly."""
    number = st.integers(0, choices - 1)
    said = draw(st.lists(number.flatmap(chunks_of_choice), max_size=8))
    reasons = st.sampled_from(["stop", "stop", "length", "tool_calls", "abort", "new"])
    ends = [chunks.finish(draw(reasons), n, tokens=draw(tokens)) for n in range(choices)]
    tail = [chunks.final_usage(draw(st.integers(0, 99)))] if draw(st.booleans()) else []
    return [*said, *ends, *tail, chunks.DONE]


# --- What nobody should say -----------------------------------------------------------------------

wrong_values = st.one_of(
    json_values,
    st.sampled_from([10**30, -1, 2**63, 2**64, 1e308, True, "\ud83d", "\udc00x", [], {}, [[]], {"a": {"b": 1}}]),
)
_PLACES: tuple[tuple[str | int, ...], ...] = (
    ("id",),
    ("model",),
    ("created",),
    ("choices",),
    ("usage",),
    ("usage", "completion_tokens"),
    ("usage", "prompt_tokens_details"),
    ("extra",),
    ("choices", 0),
    ("choices", 0, "index"),
    ("choices", 0, "delta"),
    ("choices", 0, "logprobs"),
    ("choices", 0, "logprobs", "content"),
    ("choices", 0, "token_ids"),
    ("choices", 0, "finish_reason"),
    ("choices", 0, "stop_reason"),
    ("choices", 0, "unknown"),
    ("choices", 0, "delta", "role"),
    ("choices", 0, "delta", "content"),
    ("choices", 0, "delta", "reasoning"),
    ("choices", 0, "delta", "refusal"),
    ("choices", 0, "delta", "unknown"),
    ("choices", 0, "delta", "tool_calls"),
    ("choices", 0, "delta", "tool_calls", 0),
    ("choices", 0, "delta", "tool_calls", 0, "index"),
    ("choices", 0, "delta", "tool_calls", 0, "id"),
    ("choices", 0, "delta", "tool_calls", 0, "function"),
    ("choices", 0, "delta", "tool_calls", 0, "function", "name"),
    ("choices", 0, "delta", "tool_calls", 0, "function", "arguments"),
)


@st.composite
def wrong_chunks(draw: st.DrawFn) -> bytes:
    """A chunk with something else in one or two of its fields."""
    call = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{}"}}
    delta = {"role": "assistant", "content": "a", "reasoning": "b", "refusal": "", "tool_calls": [call]}
    choice = {"index": 0, "delta": delta, "logprobs": {"content": []}, "finish_reason": None}
    body: Any = {"id": "x", "model": "m", "choices": [choice], "usage": {"completion_tokens": 1}}
    for place in draw(st.lists(st.sampled_from(_PLACES), min_size=1, max_size=2)):
        _put(body, place, draw(wrong_values))
    return chunks.frame(body)


def _put(body: Any, place: Sequence[str | int], value: Any) -> None:
    """Sets the value at this place, or nothing where an earlier one left no such place."""
    try:
        for step in place[:-1]:
            body = body[step]
        body[place[-1]] = deepcopy(value)  # drawn values are shared, and this one may be changed next
    except (TypeError, KeyError, IndexError):
        return


garbage = st.one_of(
    wrong_chunks(),
    wrong_chunks(),
    st.binary(max_size=30),
    st.binary(max_size=30).map(lambda data: b"data: " + data + b"\n\n"),
    json_values.map(chunks.frame),
    st.sampled_from(
        [
            b"data: [DONE]\n\n",
            b"data: {}\n\n",
            b"data: " + b"[" * 2000 + b"\n\n",
            b'data: {"x":' + b"[" * 300 + b"]" * 300 + b"}\n\n",
            b'data: {"x":' + b"9" * 5000 + b"}\n\n",
            b'data: {"choices":[{"index":0,"delta":{"content":"\xf0\x9f"}}]}\n\n',
            b"data: " + b"x" * 3000,
            b"\n\n",
            chunks.error(),
            chunks.error(code=400),
            chunks.frame({"error": "\ud800"}),
            chunks.frame({"object": "error", "message": "x", "code": True}),
            chunks.finish("abort"),
            chunks.content("x", choice=7),
            chunks.content("x", choice=-1),
        ]
    ),
)

# --- What else may happen -------------------------------------------------------------------------

_TIMES = st.sampled_from([0.0, 0.5, 1.0, 1.5, 20.0, 40.0, 599.0, 601.0]).map(lambda seconds: seconds + STARTED)
_RESET = EngineError("engine_connection", "the connection was reset")
_REFUSALS = st.sampled_from([b"", b"{}", b'{"error": {"message": "no", "code": 429}}', b"\xff", b"[" * 3000])


@st.composite
def signals(draw: st.DrawFn) -> Signal:
    """Anything but bytes of the engine."""
    now = draw(_TIMES)
    kinds: list[Callable[[], Signal]] = [
        lambda: EngineClosed(draw(st.sampled_from([None, _RESET])), now),
        lambda: ClientLeft(now),
        lambda: ClientBacklog(draw(st.sampled_from([0, 1, 2**17, 2**19, 2**22])), now),
        lambda: ClientBacklog(draw(st.sampled_from([0, 2**19])), now),
        lambda: Cancelled(now),
        lambda: Draining(now),
        lambda: Broke(now),
        lambda: ClockTicked(now),
        lambda: ClockTicked(now),
        lambda: ClockTicked(now),
        lambda: EngineRefused(draw(st.sampled_from([200, 302, 400, 404, 429, 500, 999])), draw(_REFUSALS), now),
        lambda: EngineAnswered(draw(_REFUSALS), now),
    ]
    return draw(st.sampled_from(kinds))()
