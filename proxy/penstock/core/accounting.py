"""What was generated, delivered and withheld: two meters and the engine's own count.

`generated` stands right behind the reader, `feed` right before the numbering; between them nothing may get
lost, so generated + added = delivered + everything withheld, in bytes, at the end of every stream (G6).
"""

from penstock.core.events import (
    Channel,
    EngineUsage,
    Event,
    Ext,
    Finished,
    Text,
    ToolArguments,
    ToolDelta,
    Usage,
    Withheld,
    token_count,
    utf8_size,
)

_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


class Accounting:
    """The step. Consumes `Withheld` and `EngineUsage`; everything else passes."""

    def __init__(self) -> None:
        self._sizes = {
            "generated": 0, "added": 0, "delivered": 0, "marker": 0, "hidden": 0, "stop": 0, "moderation": 0
        }  # fmt: skip
        self._reasoning_tokens = 0
        self._answer_tokens = 0
        self._tool_tokens = 0
        self._delivered_tokens = 0
        self._generated_tokens = 0
        self._by_choice: dict[int, int] = {}
        self._engine: Ext = {}
        self._engine_was_final = False
        self._before: Ext = {}  # what the engine counted in the rounds before this one
        self._all_were_final = True

    def generated(self, items: list[Event]) -> None:
        """The first meter: what the engine wrote, before any step."""
        for item in items:
            if isinstance(item, Text):
                self._sizes["generated"] += utf8_size(item.text)
                self._generate(item.choice, item.tokens)
            elif isinstance(item, ToolDelta):
                self._sizes["generated"] += utf8_size(item.arguments)
                self._generate(item.choice, item.tokens)
            elif isinstance(item, Finished):
                self._generate(item.choice, item.tokens)

    def feed(self, items: list[Event]) -> list[Event]:
        """The second meter: what leaves, and what was kept back on the way."""
        consumed = False
        for item in items:
            if isinstance(item, Text):
                self._deliver_text(item)
            elif isinstance(item, ToolArguments):
                self._deliver(item)
                self._tool_tokens += item.tokens
                self._delivered_tokens += item.tokens
            elif isinstance(item, Withheld):
                consumed = True
                self._sizes[item.kind] += utf8_size(item.text)
                if item.kind == "hidden":
                    self._reasoning_tokens += item.tokens
            elif isinstance(item, EngineUsage):
                consumed = True
                self._engine = item.fields
                self._engine_was_final = item.final
        return [i for i in items if not isinstance(i, Withheld | EngineUsage)] if consumed else items

    def take_back(self, items: list[Event]) -> None:
        """`items` were counted as delivered and then never sent: their client is gone."""
        for item in items:
            if not isinstance(item, Text | ToolArguments):
                continue
            size = utf8_size(item.text)
            self._sizes["delivered"] -= size
            self._delivered_tokens -= item.tokens
            if isinstance(item, Text) and item.added:
                self._sizes["added"] -= size

    def usage(self, *, final: bool, wanted_tokens: int | None = None) -> Usage:
        """The counts so far. `estimated` unless the engine gave its total for the whole request.

        `wanted_tokens`: how many were generated when nobody wanted any more, where the stream was cancelled.
        """
        engine, exact = self._summed(), self._engine_was_final and self._all_were_final
        completion = self._generated_tokens
        if exact:
            completion = max(completion, _count(engine, "completion_tokens"))
        reasoning = _detail(engine, "completion_tokens_details", "reasoning_tokens") if exact else None
        counted = self._reasoning_tokens if reasoning is None else reasoning
        return Usage(
            prompt_tokens=_count(engine, "prompt_tokens"),
            cached_tokens=_detail(engine, "prompt_tokens_details", "cached_tokens") or 0,
            completion_tokens=completion,
            reasoning_tokens=counted,
            answer_tokens=self._answer_tokens,
            tool_tokens=self._tool_tokens,
            delivered_tokens=self._delivered_tokens,
            wasted_tokens_after_cancel=0 if wanted_tokens is None else max(0, completion - wanted_tokens),
            estimated=not exact,
            sizes=dict(self._sizes),
            final=final,
            engine_fields=engine if exact else None,
        )

    def next_round(self) -> None:
        """The engine is asked again in the same stream: its next counts come on top of these."""
        if not self._engine_was_final:
            self._all_were_final = False
        self._before = self._summed()
        self._engine, self._engine_was_final = {}, False

    def _summed(self) -> Ext:
        """The engine's counts of all rounds so far, in its own shape."""
        if not self._before:
            return self._engine
        total = {name: _count(self._before, name) + _count(self._engine, name) for name in _COUNTS}
        cached = [
            _detail(usage, "prompt_tokens_details", "cached_tokens") or 0 for usage in (self._before, self._engine)
        ]
        return {**total, "prompt_tokens_details": {"cached_tokens": sum(cached)}}

    def tokens_of(self, choice: int) -> tuple[int, int]:
        """Prompt tokens and the tokens that `choice` has generated so far."""
        return _count(self._engine, "prompt_tokens"), self._by_choice.get(choice, 0)

    @property
    def generated_tokens(self) -> int:
        return self._generated_tokens

    @property
    def generated_bytes(self) -> int:
        return self._sizes["generated"]

    def _generate(self, choice: int, tokens: int) -> None:
        if tokens:
            self._generated_tokens += tokens
            self._by_choice[choice] = self._by_choice.get(choice, 0) + tokens

    def _deliver(self, item: Text | ToolArguments) -> None:
        size = utf8_size(item.text)
        self._sizes["delivered"] += size
        if item.added:
            self._sizes["added"] += size

    def _deliver_text(self, item: Text) -> None:
        self._deliver(item)
        self._delivered_tokens += item.tokens
        if item.channel is Channel.REASONING or item.inlined:
            self._reasoning_tokens += item.tokens
        else:
            self._answer_tokens += item.tokens


def size_of(items: list[Event]) -> int:
    """Bytes that the model wrote and that stand in `items`, which were never sent."""
    written = [i for i in items if isinstance(i, Withheld) or (isinstance(i, Text | ToolArguments) and not i.added)]
    return sum(utf8_size(item.text) for item in written)


def _count(usage: Ext, name: str) -> int:
    return token_count(usage.get(name)) or 0


def _detail(usage: Ext, group: str, name: str) -> int | None:
    details = usage.get(group)
    return token_count(details.get(name)) if isinstance(details, dict) else None
