"""An event log folded into what it adds up to: the answer for clients that want one object, and the snapshot."""

from typing import Any

Event = dict[str, Any]


class Fold:
    """Takes the events of one stream in order, as dictionaries of the schema; unknown types are passed over (G9)."""

    def __init__(self) -> None:
        self._result: dict[str, Any] = {"status": "running", "choices": [], "warnings": [], "error": None}
        self._choices: dict[int, dict[str, Any]] = {}
        self._blocks: dict[tuple[int, int], dict[str, Any]] = {}

    def feed(self, event: Event) -> None:
        self._result["last_seq"] = event["seq"]
        name, _, part = event["type"].partition(".")
        match name, part:
            case "stream", "start":
                self._begin(event)
            case "delta", "role":
                self._choice(event)["role"] = event["role"]
            case "delta", "text" | "reasoning":
                self._delta(event)
            case "reasoning" | "text" | "tool_call", "start":
                self._open_block(event, name)
            case "tool_call", "arguments_chunk" | "ready" | "denied" | "result":
                self._call(event, part)
            case "structured", "":
                self._choice(event).setdefault("structured", []).append(_without(event, "choice"))
            case "annotation", "":
                self._result.setdefault("annotations", []).append(_without(event))
            case "reasoning" | "text" | "tool_call", "end":
                self._close_block(event)
            case "moderation", "":
                self._result.setdefault("moderation", []).append(_without(event))
            case "finish", "":
                self._choice(event)["finish"] = _without(event, "choice")
            case "usage", "":
                self._result["usage"] = _without(event, "final")
            case "warning", "":
                self._result["warnings"].append(_without(event))
            case "error", "":
                self._result["error"] = _without(event)
            case "stream", "end":
                self._result.update(_without(event, "events", "finish_reasons"))

    def result(self) -> dict[str, Any]:
        self._result["choices"] = [self._choices[index] for index in sorted(self._choices)]
        return self._result

    def _begin(self, event: Event) -> None:
        names = ("stream_id", "schema", "model", "upstream", "trace_id", "continues")
        begun = {name: event[name] for name in names if name in event}
        self._result = {**begun, **self._result, "last_seq": event["seq"]}

    def _choice(self, event: Event) -> dict[str, Any]:
        index = event["choice"]
        if index not in self._choices:
            self._choices[index] = {
                "choice": index,
                "role": "assistant",
                "text": "",
                "blocks": [],
                "finish": None,
            }
        return self._choices[index]

    def _open_block(self, event: Event, kind: str) -> None:
        block: dict[str, Any] = {"block": event["block"], "type": kind}
        if kind == "tool_call":
            names = {"call_id": event["call_id"], "name": event["name"]}
            block |= {**names, "arguments": None, "arguments_text": "", "valid": None}
        else:
            block["text"] = ""
        block["status"] = "open"
        self._blocks[event["choice"], event["block"]] = block
        self._choice(event)["blocks"].append(block)

    def _block(self, event: Event) -> dict[str, Any]:
        return self._blocks[event["choice"], event["block"]]

    def _call(self, event: Event, part: str) -> None:
        block = self._block(event)
        match part:
            case "arguments_chunk":
                block["arguments_text"] += event["text"]
            case "ready":
                block["arguments"] = event["arguments"]
            case "denied":
                block["denied"] = {"rule": event["rule"], "reason": event["reason"]}
            case "result":
                block["result"] = _without(event, "choice", "block", "call_id", "name")

    def _delta(self, event: Event) -> None:
        block = self._block(event)
        block["text"] += event["text"]
        for name in ("logprobs", "token_ids"):
            if name in event:
                block[name] = block.get(name, []) + event[name]
        if block["type"] == "text":
            self._choice(event)["text"] += event["text"]

    def _close_block(self, event: Event) -> None:
        names = ("status", "valid", "problem", "tokens")
        self._block(event).update({name: event[name] for name in names if name in event})


def _without(event: Event, *names: str) -> Event:
    envelope = ("type", "stream_id", "seq", "ts", *names)
    return {name: value for name, value in event.items() if name not in envelope}
