"""When which part of an answer was generated: offsets and times for the audit, no text."""

from penstock.core.events import Event, Finished, Text, ToolDelta

# About a day of tokens; what comes after is not in it.
_MOST_ENTRIES = 100_000


class Timeline:
    """`entries` are (ms since the request, choice, characters so far, tokens so far), for each piece of the engine."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, int, int]] = []
        self._so_far: dict[int, tuple[int, int]] = {}

    def note(self, items: list[Event], seconds: float) -> None:
        for item in items:
            if not isinstance(item, Text | ToolDelta | Finished) or len(self.entries) >= _MOST_ENTRIES:
                continue
            text = item.text if isinstance(item, Text) else item.arguments if isinstance(item, ToolDelta) else ""
            if text or item.tokens:
                chars, tokens = self._so_far.get(item.choice, (0, 0))
                self._so_far[item.choice] = chars, tokens = chars + len(text), tokens + item.tokens
                self.entries.append((int(seconds * 1000), item.choice, chars, tokens))
