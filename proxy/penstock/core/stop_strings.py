"""Stop strings that Penstock itself enforces, in the answer only.

The request's own `stop` goes to vLLM, which looks for it in everything the model writes, its reasoning
included. `penstock.stop` is looked for here, in the answer alone, wherever the pieces are cut.
"""

from penstock.core.events import Channel, Event, Finished, Text, Withheld
from penstock.core.markers import Markers


class StopStrings:
    """The step: cuts each choice at its first stop string and finishes it there.

    With `include` the string itself is still delivered. Holds at most the longest string less one character.
    """

    def __init__(self, strings: tuple[str, ...], *, include: bool) -> None:
        shortest = sorted(set(strings), key=len)
        words = [word for n, word in enumerate(shortest) if not any(word.startswith(s) for s in shortest[:n])]
        self._markers = Markers(words)
        self._include = include
        self._held: dict[int, str] = {}
        self._stopped: set[int] = set()

    def feed(self, items: list[Event]) -> list[Event]:
        if not self._markers.words:
            return items
        out: list[Event] = []
        for item in items:
            choice: int | None = getattr(item, "choice", None)
            if choice is not None and choice in self._stopped:
                self._withhold(choice, item, out)
            elif isinstance(item, Text) and item.channel is Channel.ANSWER:
                self._text(item, out)
            else:
                if choice is not None:
                    out += self._release(choice)
                out.append(item)
        return out

    def has_stopped(self, choice: int) -> bool:
        return choice in self._stopped

    def flush(self) -> list[Event]:
        return [event for choice in list(self._held) for event in self._release(choice)]

    def _text(self, item: Text, out: list[Event]) -> None:
        choice = item.choice
        text = self._held.pop(choice, "") + item.text
        found = self._markers.pattern.search(text)
        if found is None:
            free = len(text) - self._markers.unfinished(text)
            if free < len(text):
                self._held[choice] = text[free:]
            item.text = text[:free]
            if item.text:
                out.append(item)
            return
        cut = found.end() if self._include else found.start()
        item.text = text[:cut]
        if item.text:
            out.append(item)
        out.append(Withheld(choice, "stop", text[cut:]))
        self._stopped.add(choice)
        out.append(Finished(choice, "stop", found.group(), reason="stop", cause="stop_string"))

    def _release(self, choice: int) -> list[Event]:
        held = self._held.pop(choice, "")
        return [Text(choice, Channel.ANSWER, held)] if held else []

    @staticmethod
    def _withhold(choice: int, item: Event, out: list[Event]) -> None:
        """What a stopped choice still says is counted, not sent; its own end was already told."""
        text: str = getattr(item, "text", "")
        tokens: int = getattr(item, "tokens", 0)
        if text or tokens:
            out.append(Withheld(choice, "stop", text, tokens))
