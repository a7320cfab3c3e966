"""The partial answer of a stream that failed, given to the engine to be gone on with in a stream of its own.

Only an answer that is one text can be appended to: the engine goes on inside its last message. What cannot is refused
(`cannot_continue`), 409 where the failed stream is the reason and 422 where the request is.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from penstock.core.errors import CallerError
from penstock.core.events import utf8_size
from penstock.core.request import StreamRequest

PARAM = "penstock.continue"


def refuse_unfit(request: StreamRequest) -> None:
    """Raises `CallerError` (422) where no answer to this request could be appended to."""
    if request.choices > 1:
        raise _unfit("n is more than 1, and one answer is continued")
    if request.wants_json or request.structured is not None:
        raise _unfit("its answer is a value, which must be made whole")
    if request.needs_engine_text == "continue_final_message":
        raise _unfit("it continues a message of its own (continue_final_message)")


def partial_text(snapshot: Mapping[str, Any]) -> str:
    """The text of a folded log, to be appended to. Raises `CallerError` where there is a reason not to."""
    stream_id, status, error = snapshot["stream_id"], snapshot["status"], snapshot["error"] or {}
    if status != "failed":
        raise _conflict(f"the stream {stream_id} is {status}; only one that failed is continued: send a new request")
    if error.get("origin") == "policy":
        raise _conflict(f"a rule of this deployment stopped the stream {stream_id}; it is not gone on with")
    nothing: dict[str, Any] = {"text": "", "blocks": [], "finish": None}
    choice = next(iter(snapshot["choices"]), nothing)
    if any(block["type"] == "tool_call" for block in choice["blocks"]):
        raise _unfit(f"the stream {stream_id} called tools, and only text is continued")
    if choice["finish"] is not None and choice["finish"]["reason"] != "error":
        raise _conflict(f"the answer of the stream {stream_id} is whole: it failed after its end")
    text: str = choice["text"]
    return text


def carry_on(request: StreamRequest, text: str) -> StreamRequest:
    """The request with the answer so far as the message that the engine goes on with (vLLM's words for it)."""
    if not text:
        raise said_nothing()
    body = orjson.loads(request.engine_body)
    body["messages"].append({"role": "assistant", "content": text})
    body |= {"continue_final_message": True, "add_generation_prompt": False}
    return replace(
        request,
        engine_body=orjson.dumps(body),
        begun_text=text,
        thinking=False,  # what is gone on with is the answer, whatever its reasoning was
        text_bytes=request.text_bytes + utf8_size(text),
        needs_engine_text="continue_final_message",
    )


def other_request(stream_id: str) -> CallerError:
    return _unfit(f"the stream {stream_id} answered another request; repeat that one, changing only penstock")


def still_runs(stream_id: str) -> CallerError:
    return _conflict(f"the stream {stream_id} still runs; resume it, or cancel it and send the request again")


def said_nothing() -> CallerError:
    return _conflict("the stream has said nothing of its answer; send the request again")


def not_of_events(stream_id: str) -> CallerError:
    return _unfit(f"the stream {stream_id} was no stream of events (SSE or NDJSON), so its text is not known")


def tools_run_here() -> CallerError:
    return _unfit("Penstock runs its tools; say penstock.tools.run: false, or send it without penstock.continue")


def _unfit(why: str) -> CallerError:
    return CallerError("cannot_continue", f"this request cannot continue a stream: {why}", status=422, param=PARAM)


def _conflict(why: str) -> CallerError:
    return CallerError("cannot_continue", why, status=409, param=PARAM)
