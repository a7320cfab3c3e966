"""Which of the model's calls may be executed: by tool, by caller, by how many, how long and with which arguments.

The first rule that names the tool decides; a call that no rule names is allowed. A denied call is told, with the
reason, and never becomes ready.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import orjson

from penstock.core.events import (
    Event,
    Finished,
    ToolArguments,
    ToolDenied,
    ToolEnded,
    ToolReady,
    ToolStarted,
    utf8_size,
)
from penstock.core.schemas import Schema

_UNWANTED = "its arguments are not allowed"


@dataclass(frozen=True, slots=True)
class ToolRule:
    """`tools` are shell patterns. `most_calls` counts per stream, `most_bytes` the UTF-8 length of the arguments."""

    name: str
    tools: tuple[str, ...]
    allows: bool = True
    reason: str = ""
    most_calls: int | None = None
    most_bytes: int | None = None
    arguments: Schema | None = None

    def is_for(self, tool: str) -> bool:
        return any(fnmatchcase(tool, pattern) for pattern in self.tools)


@dataclass(slots=True)
class _Call:
    name: str
    rule: ToolRule
    size: int = 0
    reason: str | None = None  # why it was denied


class ToolPolicy:
    """The step. `rules` are those that concern this caller, in their order."""

    def __init__(self, rules: Sequence[ToolRule]) -> None:
        self._rules = rules
        self._calls: dict[tuple[int, str], _Call] = {}
        self._counts: dict[str, int] = {}
        self._allowed: set[int] = set()

    def feed(self, items: list[Event]) -> list[Event]:
        if not self._rules:
            return items
        out: list[Event] = []
        for item in items:
            match item:
                case ToolStarted():
                    self._start(item, out)
                case ToolArguments():
                    self._grow(item, out)
                case ToolReady():
                    self._judge(item, out)
                case ToolEnded() if (call := self._calls.pop((item.choice, item.call_id), None)) and call.reason:
                    item.valid, item.problem = False, f"denied by policy: {call.reason}"
                    out.append(item)
                case Finished() if item.calls_in_text and item.choice not in self._allowed:
                    item.reason, item.calls_in_text = "stop", False  # what the engine itself said
                    out.append(item)
                case _:
                    out.append(item)
        return out

    def problem_of(self, name: str, arguments: str) -> str | None:
        """Why the policy forbids a call with these arguments (one JSON object), or None."""
        rule = self._rule_for(name)
        problem = rule.arguments.problem(orjson.loads(arguments)) if rule is not None and rule.arguments else None
        return None if problem is None else f"{_UNWANTED}: {problem}"

    def next_round(self) -> None:
        """The model speaks again in the same stream; what it may still call is counted on."""
        self._allowed.clear()

    def _start(self, item: ToolStarted, out: list[Event]) -> None:
        out.append(item)
        rule = self._rule_for(item.name)
        if rule is None:
            return
        call = self._calls[item.choice, item.call_id] = _Call(item.name, rule)
        count = self._counts[rule.name] = self._counts.get(rule.name, 0) + 1
        if not rule.allows:
            self._deny(item.choice, item.call_id, call, rule.reason or f"{item.name!r} is not allowed here", out)
        elif rule.most_calls is not None and count > rule.most_calls:
            self._deny(item.choice, item.call_id, call, f"more than {rule.most_calls} calls in one stream", out)
        item.denied = call.reason is not None

    def _rule_for(self, name: str) -> ToolRule | None:
        return next((rule for rule in self._rules if rule.is_for(name)), None)

    def _grow(self, item: ToolArguments, out: list[Event]) -> None:
        out.append(item)
        call = self._calls.get((item.choice, item.call_id))
        if call is None or call.reason is not None or call.rule.most_bytes is None:
            return
        call.size += utf8_size(item.text)
        if call.size > call.rule.most_bytes:
            reason = f"its arguments are longer than {call.rule.most_bytes} bytes"
            self._deny(item.choice, item.call_id, call, reason, out)

    def _judge(self, item: ToolReady, out: list[Event]) -> None:
        call = self._calls.get((item.choice, item.call_id))
        if call is not None and call.reason is None and call.rule.arguments is not None:
            problem = call.rule.arguments.problem(orjson.loads(item.arguments))
            if problem is not None:
                self._deny(item.choice, item.call_id, call, f"{_UNWANTED}: {problem}", out)
        if call is None or call.reason is None:
            self._allowed.add(item.choice)
            out.append(item)

    def _deny(self, choice: int, call_id: str, call: _Call, reason: str, out: list[Event]) -> None:
        call.reason = reason
        out.append(ToolDenied(choice, call_id, call.name, call.rule.name, reason))
