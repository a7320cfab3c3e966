"""Stop strings that Penstock itself enforces, in the answer only.

The request's own `stop` goes to vLLM, which looks for it in everything the model writes, its reasoning
included. `penstock.stop` is looked for here, in the answer alone, wherever the pieces are cut.
"""

from penstock.core.events import Channel, Event, Extra, Finished, Role, Text, ToolDelta, Withheld
from penstock.core.markers import Markers


class StopStrings:
    """The step: cuts each choice where its first stop string is complete and finishes it there.

    With `include` the string itself is still delivered. Holds at most the longest string less one character.
    """

    def __init__(self, strings: tuple[str, ...], *, include: bool) -> None:
        words: list[str] = []
        for word in sorted(set(strings), key=len):
            if not any(shorter in word[:-1] for shorter in words):  # else the shorter is always complete first
                words.append(word)
        self._markers = Markers(words)
        self._include = include
        self._held: dict[int, Text] = {}
        self._stopped: set[int] = set()

    def feed(self, items: list[Event]) -> list[Event]:
        if not self._markers.words:
            return items
        out: list[Event] = []
        for item in items:
            choice: int | None = getattr(item, "choice", None)
            if choice is None or isinstance(item, Extra | Role):
                out.append(item)
            elif choice in self._stopped:
                self._withhold(choice, item, out)
            elif isinstance(item, Text) and _is_searched(item):
                self._text(item, out)
            else:
                self._release(choice, out)
                out.append(item)
        return out

    def has_stopped(self, choice: int) -> bool:
        return choice in self._stopped

    def flush(self) -> list[Event]:
        out: list[Event] = []
        for choice in list(self._held):
            self._release(choice, out)
        return out

    def _text(self, item: Text, out: list[Event]) -> None:
        if (held := self._held.pop(item.choice, None)) is not None:
            _put_before(held, item)
        text = item.text
        found = self._markers.pattern.search(text)
        if found is not None:
            self._stop(item, found.group(), found.end() if self._include else found.start(), out)
            return
        free = len(text) - self._markers.unfinished(text)
        if not free:
            self._held[item.choice] = item
            return
        if free < len(text):
            self._held[item.choice] = Text(item.choice, Channel.ANSWER, text[free:])
            item.text = text[:free]
        out.append(item)

    def _stop(self, item: Text, stop: str, cut: int, out: list[Event]) -> None:
        finished = Finished(item.choice, "stop", stop, reason="stop", cause="stop_string")
        text, item.text = item.text, item.text[:cut]
        if item.text:
            out.append(item)
        else:
            finished.tokens, finished.logprobs, finished.token_ids = item.tokens, item.logprobs, item.token_ids
        if text[cut:]:
            out.append(Withheld(item.choice, "stop", text[cut:]))
        self._stopped.add(item.choice)
        out.append(finished)

    def _release(self, choice: int, out: list[Event]) -> None:
        if (held := self._held.pop(choice, None)) is not None:
            out.append(held)

    @staticmethod
    def _withhold(choice: int, item: Event, out: list[Event]) -> None:
        """What a stopped choice still says is counted, not sent; its own end was already told."""
        text: str = item.arguments if isinstance(item, ToolDelta) else getattr(item, "text", "")
        tokens: int = getattr(item, "tokens", 0)
        is_added = isinstance(item, Text) and item.added
        if (text or tokens) and not is_added:
            out.append(Withheld(choice, "stop", text, tokens))


def _is_searched(item: Text) -> bool:
    return item.channel is Channel.ANSWER and not (item.added or item.inlined or item.refusal)


def _put_before(held: Text, item: Text) -> None:
    item.text = held.text + item.text
    item.tokens += held.tokens
    if held.logprobs is not None:
        item.logprobs = held.logprobs + (item.logprobs or [])
    if held.token_ids is not None:
        item.token_ids = held.token_ids + (item.token_ids or [])
