"""What is known of a prompt before anybody renders it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.detokenize import Vocabulary
from penstock.core.prompt import least_tokens, prefix_key
from support.tokenizers_made import made

SYSTEM = {"role": "system", "content": "You are terse."}
HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "Hello!"}
QWEN = Vocabulary(made("qwen").json)


def body(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


# --- Prompts that begin alike -------------------------------------------------------------------------


def test_a_conversation_keeps_its_key_as_it_grows() -> None:
    turns = [SYSTEM, HI, HELLO, {"role": "user", "content": "and now?"}, HELLO]
    assert len({prefix_key(body(*turns[:count]), 4096) for count in (2, 3, 4, 5)}) == 1


def test_other_questions_other_models_and_other_tools_have_other_keys() -> None:
    one = prefix_key(body(SYSTEM, HI), 4096)
    others = [
        body(SYSTEM, {"role": "user", "content": "ho"}),
        body(HI),
        body(SYSTEM, HI, model="n"),
        body(SYSTEM, HI, tools=[{"type": "function", "function": {"name": "f"}}]),
    ]
    assert len({one, *(prefix_key(other, 4096) for other in others)}) == 5


def test_what_comes_after_the_prefix_does_not_count() -> None:
    long = {"role": "system", "content": "x" * 5000}
    keys = {prefix_key(body(long, {"role": "user", "content": word}), 4096) for word in ("a", "b", "c")}
    assert len(keys) == 1


def test_sampling_does_not_count() -> None:
    assert prefix_key(body(HI, temperature=0), 4096) == prefix_key(body(HI, temperature=1, stream=True), 4096)


def test_what_is_nested_too_deeply_to_be_written_has_a_key_of_its_own() -> None:
    def deep(levels: int) -> bytes:
        return b'{"model":"m","messages":[{"role":"user","content":' + b"[" * levels + b"]" * levels + b"}]}"

    keys = [prefix_key(deep(levels), 4096) for levels in (10, 300, 301, 1000)]
    assert len(set(keys)) == len(keys)
    assert prefix_key(deep(300), 4096) == keys[1]


# --- How long at least --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [None, QWEN.count])
def test_the_bound_is_one(count: Any) -> None:
    """Never more than the texts are, as the tokenizer sees them in their place."""
    text = "one two three four five six seven eight " * 50
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    least = least_tokens(body({"role": "user", "content": text}), count)
    assert 0 < least <= QWEN.count(rendered)


@given(st.lists(st.text(max_size=60), max_size=4))
def test_no_text_makes_it_more_than_it_is(texts: list[str]) -> None:
    rendered = "".join(f"<|im_start|>user\n{text.strip()}<|im_end|>\n" for text in texts)
    asked = body(*({"role": "user", "content": text} for text in texts))
    assert least_tokens(asked, None) <= least_tokens(asked, QWEN.count) + len(texts)
    assert least_tokens(asked, QWEN.count) <= QWEN.count(rendered)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "<think>" + "word " * 900 + "</think>yes"},
        {"role": "user", "content": " " * 5000},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:" + "x " * 5000}}]},
        {"role": "user", "content": None},
        {"role": "user"},
        "word " * 900,
        {"role": "user", "content": [7, {"type": "text"}, {"type": "text", "text": 7}]},
    ],
)
def test_what_a_template_may_leave_out_is_not_counted(message: Any) -> None:
    assert least_tokens(body(message), QWEN.count) == 0
    assert least_tokens(body(message), None) == 0


def test_text_parts_are_counted() -> None:
    parts = [{"type": "text", "text": "word " * 100}, {"type": "image_url", "image_url": {"url": "x"}}]
    assert least_tokens(body({"role": "user", "content": parts}), None) == 25


def test_a_prompt_that_vllm_truncates_is_never_too_long() -> None:
    assert least_tokens(body({"role": "user", "content": "word " * 900}, truncate_prompt_tokens=10), QWEN.count) == 0
