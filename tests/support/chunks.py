"""What a vLLM says on its chat route, piece by piece: every function returns one server-sent event as bytes."""

import json
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
MODEL = "tiny"
ENGINE_ID = "chatcmpl-1"
CREATED = 1_795_228_289
HEAD: Json = {"id": ENGINE_ID, "object": "chat.completion.chunk", "created": CREATED, "model": MODEL}


def frame(body: Any) -> bytes:
    """Any JSON as one event; characters are escaped as `json` does it, so that lone surrogates can be said too."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def chunk(*choices: Json, usage: Json | None = None, **more: Any) -> bytes:
    counted = {} if usage is None else {"usage": usage}
    return frame({**HEAD, "choices": list(choices), **counted, **more})


def spoken(delta: Json, *, choice: int = 0, tokens: int | None = None, **more: Any) -> bytes:
    """One delta of one choice. `tokens` is its running count, as with `continuous_usage_stats`."""
    usage = None if tokens is None else counts(tokens)
    return chunk({"index": choice, "delta": delta, "logprobs": None, "finish_reason": None, **more}, usage=usage)


def counts(completion: int, prompt: int = 9) -> Json:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def role(choice: int = 0, **more: Any) -> bytes:
    return spoken({"role": "assistant", "content": ""}, choice=choice, **more)


def content(text: str, choice: int = 0, **more: Any) -> bytes:
    return spoken({"content": text}, choice=choice, **more)


def reasoning(text: str, choice: int = 0, **more: Any) -> bytes:
    return spoken({"reasoning": text}, choice=choice, **more)


def tool(
    index: int = 0,
    *,
    call_id: str | None = None,
    name: str | None = None,
    arguments: Any = None,
    choice: int = 0,
    **more: Any,
) -> bytes:
    """One piece of a call as an engine with a tool parser cuts it; what is None is left out."""
    given = {"name": name, "arguments": arguments}
    call: Json = {"index": index, "function": {key: value for key, value in given.items() if value is not None}}
    if call_id is not None:
        call |= {"id": call_id, "type": "function"}
    return spoken({"content": None, "tool_calls": [call]}, choice=choice, **more)


def finish(reason: str = "stop", choice: int = 0, *, stop: Any = None, delta: Json | None = None, **more: Any) -> bytes:
    return spoken(delta or {}, choice=choice, **{"finish_reason": reason, "stop_reason": stop, **more})


def final_usage(completion: int, prompt: int = 9, **more: Any) -> bytes:
    return chunk(usage={**counts(completion, prompt), **more}, system_fingerprint="vllm-0.32.0-925e852b")


def error(message: str = "boom", code: int = 500) -> bytes:
    return frame({"error": {"message": message, "type": "InternalServerError", "param": None, "code": code}})


def answer(*pieces: bytes, reason: str = "stop", completion: int = 7) -> list[bytes]:
    """One whole stream: the role, the pieces, the finish of choice 0, the usage and the end mark."""
    return [role(), *pieces, finish(reason), final_usage(completion), DONE]


def answer_of(texts: Sequence[str], reason: str = "stop") -> list[bytes]:
    return answer(*map(content, texts), reason=reason)


def whole(*messages: Json, usage: Json | None = None, finish_reason: str = "stop", **more: Any) -> bytes:
    """The body of an answer that was not streamed, one message per choice. `more` stands beside each message."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": None, **message},
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
            "token_ids": None,
            **more,
        }
        for index, message in enumerate(messages)
    ]
    head = {"id": ENGINE_ID, "object": "chat.completion", "created": CREATED, "model": MODEL}
    return json.dumps({**head, "choices": choices, "usage": usage or counts(7)}).encode()
