"""Which folded logs are gone on with, and what the engine is asked then."""

from typing import Any

import orjson
import pytest

from penstock.core.continuing import carry_on, partial_text
from penstock.core.errors import CallerError
from penstock.core.request import read_request


def snapshot(status: str = "failed", origin: str = "upstream", reason: str | None = "error", *kinds: str) -> Any:
    finish = None if reason is None else {"reason": reason}
    blocks = [{"type": kind} for kind in kinds]
    choices = [{"choice": 0, "text": "Hel", "blocks": blocks, "finish": finish}]
    return {"stream_id": "st_1", "status": status, "error": {"origin": origin}, "choices": choices}


@pytest.mark.parametrize("reason", ["error", None])
def test_the_text_of_a_failed_answer(reason: str | None) -> None:
    assert partial_text(snapshot("failed", "proxy", reason, "reasoning", "text")) == "Hel"


def test_no_answer_is_no_text() -> None:
    assert partial_text({**snapshot(), "choices": []}) == ""


@pytest.mark.parametrize(
    ("folded", "status", "why"),
    [
        (snapshot("completed"), 409, "is completed"),
        (snapshot("incomplete"), 409, "is incomplete"),
        (snapshot("cancelled"), 409, "is cancelled"),
        (snapshot("running"), 409, "is running"),
        (snapshot("failed", "policy"), 409, "a rule of this deployment"),
        (snapshot("failed", "upstream", "stop"), 409, "is whole"),
        (snapshot("failed", "upstream", "error", "text", "tool_call"), 422, "called tools"),
    ],
)
def test_what_is_not_gone_on_with(folded: Any, status: int, why: str) -> None:
    with pytest.raises(CallerError, match=why) as refusal:
        partial_text(folded)
    assert (refusal.value.status, refusal.value.code) == (status, "cannot_continue")


def test_what_the_engine_is_asked() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "penstock": {"continue": "st_1"}}
    request = read_request(orjson.dumps(body), streams=True)
    asked = carry_on(request, "Hé")
    assert orjson.loads(asked.engine_body) == {
        **orjson.loads(request.engine_body),
        "messages": [*body["messages"], {"role": "assistant", "content": "Hé"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert (asked.text_bytes, asked.thinking) == (request.text_bytes + 3, False)
    assert asked.needs_engine_text == "continue_final_message"
    with pytest.raises(CallerError, match="said nothing"):
        carry_on(request, "")
