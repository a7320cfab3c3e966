"""The execution loop: calls that Penstock runs itself, and the next question to the model with what came of them.

A turn of the model whose every ready call is of a bound tool is not the end of the answer: its finish is held back, the
calls are run, and the model is asked again. A turn that also calls a tool of the client's ends as ever, and nothing of
it is run here. Calls that are denied or not valid are answered with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import orjson

from penstock.core.events import (
    Channel,
    Event,
    Finished,
    Text,
    ToolEnded,
    ToolReady,
    ToolResult,
    ToolStarted,
    Warned,
)
from penstock.core.request import StreamRequest
from penstock.core.wishes import LoopTerms, ToolRun

_NO_ROUND = "not run: the model was asked to answer now (tools.loop.rounds)"
_MIXED = "not run: the same turn calls a tool of the client's"


@dataclass(slots=True)
class _Call:
    call_id: str
    name: str
    arguments: str = ""
    answer: str | None = None  # what the model is told
    is_ready: bool = False


@dataclass(slots=True)
class _Turn:
    calls: dict[str, _Call] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)


class ToolLoop:
    """The step, and the memory of the rounds. Only for requests of one choice."""

    def __init__(self, terms: LoopTerms | None, request: StreamRequest) -> None:
        self._terms = terms if terms is not None and terms.bound and request.choices == 1 else None
        self._request = request
        self._round = 0
        self._turn = _Turn()
        self._is_due = False
        self._messages: list[dict[str, Any]] = []  # of all rounds so far, behind the request's own

    @property
    def is_due(self) -> bool:
        """Whether the model waits for the results of this turn's calls."""
        return self._is_due

    @property
    def round(self) -> int:
        """How many times the model was asked again."""
        return self._round

    def feed(self, items: list[Event]) -> list[Event]:
        if self._terms is None:
            return items
        out: list[Event] = []
        for item in items:
            match item:
                case Text(channel=Channel.ANSWER, inlined=False):
                    self._turn.text.append(item.text)
                case ToolStarted():
                    item.runs_here = item.name in self._terms.bound
                    self._turn.calls[item.call_id] = _Call(item.call_id, item.name)
                case ToolReady():
                    self._turn.calls[item.call_id].is_ready = True
                case ToolEnded():
                    call = self._turn.calls[item.call_id]
                    call.arguments, call.answer = item.arguments, item.problem
                case Finished() if self._goes_on(item, self._terms, out):
                    self._is_due = True
                    continue
                case _:
                    pass
            out.append(item)
        return out

    def runs(self) -> list[ToolRun]:
        """The calls to run now."""
        assert self._terms is not None
        self._is_due = False
        runs = []
        for number, call in enumerate(self._turn.calls.values()):
            if call.is_ready:
                said = sha256(f"{call.name}\0{call.arguments}".encode()).hexdigest()[:16]
                key = f"{self._terms.key}:{self._round}.{number}:{said}"
                runs.append(ToolRun(call.call_id, call.name, call.arguments.strip() or "{}", key))
        return runs

    def take(self, call_id: str, answer: str, result: ToolResult) -> ToolResult:
        """Keeps what the model shall be told of a call; the event tells the client what may be shown of it."""
        self._turn.calls[call_id].answer = answer
        if self._terms is not None and self._terms.shows_results:
            result.content = answer
        return result

    @property
    def is_answered(self) -> bool:
        return all(call.answer is not None for call in self._turn.calls.values())

    def ask_again(self) -> tuple[StreamRequest, list[Event]]:
        """The next question, and what there is to say of it. The last one that is allowed offers no tools."""
        assert self._terms is not None
        self._messages += _told(self._turn)
        self._turn = _Turn()
        self._round += 1
        body = orjson.loads(self._request.engine_body)
        body["messages"] = [*body["messages"], *self._messages]
        if self._round >= self._terms.rounds:
            body["tool_choice"] = "none"
            detail = f"the model called tools {self._terms.rounds} times (tools.loop.rounds); it must answer now"
            asked = replace(self._request, engine_body=orjson.dumps(body), tools={})
            return asked, [Warned("tool_rounds_limit", detail)]
        if body.get("tool_choice") not in (None, "auto", "none"):  # it would call for ever
            body["tool_choice"] = "auto"
        return replace(self._request, engine_body=orjson.dumps(body)), []

    def _goes_on(self, finished: Finished, terms: LoopTerms, out: list[Event]) -> bool:
        ready = [call for call in self._turn.calls.values() if call.is_ready]
        here = [call for call in ready if call.name in terms.bound]
        if finished.reason not in ("tool_calls", "stop") or not here:
            return False
        is_last = self._round >= terms.rounds
        if len(here) == len(ready) and not is_last:
            return True
        problem = _NO_ROUND if is_last else _MIXED
        out += [
            ToolResult(finished.choice, call.call_id, call.name, ok=False, size=0, duration_ms=0, problem=problem)
            for call in here
        ]
        return False


def _told(turn: _Turn) -> list[dict[str, Any]]:
    """What the model said in this turn and what came of it, as messages of a chat request."""
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}
        for call in turn.calls.values()
    ]
    assistant: Mapping[str, Any] = {"role": "assistant", "content": "".join(turn.text) or None, "tool_calls": calls}
    results = [
        {"role": "tool", "tool_call_id": call.call_id, "content": call.answer or ""} for call in turn.calls.values()
    ]
    return [dict(assistant), *results]


def _arguments(call: _Call) -> str:
    """Templates read them as JSON, so those that are none are not repeated."""
    return (call.arguments.strip() or "{}") if call.is_ready else "{}"
