"""What a prompt says before anybody has rendered it: which others begin alike, and how long it is at least."""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import orjson

# No tokenizer that is known here makes one token of more words: most never cross a space, and those that were trained
# to (SuperBPE) stop at four.
_WORDS_A_TOKEN = 4
# A template may join the edge of a text with what it writes around it.
_EDGE_TOKENS = 4

Counter = Callable[[str], int]


def prefix_key(body: bytes, most_bytes: int) -> bytes:
    """Equal for requests whose prompts begin alike: what stands before the first answer, the model and the tools.

    A conversation that grows keeps its key, since only what comes before its first answer counts, and requests with
    a long common beginning share one, since no more than `most_bytes` of it count.
    """
    request = orjson.loads(body)
    beginning: list[Any] = []
    for message in request["messages"]:
        if isinstance(message, dict) and message.get("role") == "assistant":
            break
        beginning.append(message)
    try:
        text = orjson.dumps([request.get("model"), beginning, request.get("tools")])
    except TypeError:  # nested more deeply than it writes; whatever vLLM makes of that, it is no conversation
        text = body
    return blake2b(text[:most_bytes], digest_size=16).digest()


def least_tokens(body: bytes, count: Counter | None) -> int:
    """How many tokens the prompt has at least. `count` is the model's tokenizer, None where it is not known.

    Counted are the texts of the messages; what a template adds is not, nor what it may leave out: answers that hold
    reasoning, and space around a text. Takes the time of `count`, seconds for a text of megabytes.
    """
    request = orjson.loads(body)
    if request.get("truncate_prompt_tokens") is not None:
        return 0  # vLLM then cuts the prompt itself
    return sum(_least(text.strip(), count) for text in _texts(request["messages"]))


def last_question(body: bytes) -> str:
    """The text of the last message, if it is the user's; else empty."""
    messages = orjson.loads(body)["messages"]
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "user":
        return ""
    return " ".join(_texts([last])).strip()


def _least(text: str, count: Counter | None) -> int:
    if count is None:
        return len(text.split()) // _WORDS_A_TOKEN
    return max(0, count(text) - _EDGE_TOKENS)


def _texts(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        if not isinstance(message, dict):
            continue
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            if isinstance(text, str) and not (message.get("role") == "assistant" and "think" in text):
                yield text
