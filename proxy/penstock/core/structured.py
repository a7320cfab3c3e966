"""Final values: what the caller asked to get as JSON, parsed and valid, once. A part of a value is never called one.

It stands behind moderation, so that a value holds nothing that the text may not.
"""

from penstock.core.events import Channel, Event, Finished, Structured, Text, Warned, Withheld
from penstock.core.extras import Extras
from penstock.core.markers import Markers
from penstock.core.wishes import StructuredWish


class StructuredAnswers:
    """The step. Keeps the text of each value until it is whole, at most a stream's bytes."""

    def __init__(self, wish: StructuredWish | None) -> None:
        self._wish = wish
        self._choices: dict[int, _Answer | _Sections] = {}

    def feed(self, items: list[Event]) -> list[Event]:
        if self._wish is None:
            return items
        out: list[Event] = []
        for item in items:
            if isinstance(item, Text) and item.channel is Channel.ANSWER and not (item.refusal or item.inlined):
                self._choice(item.choice).text(item, out)
            elif isinstance(item, Finished):
                self._choice(item.choice).finish(item, out)
                out.append(item)
            else:
                out.append(item)
        return out

    def flush(self) -> list[Event]:
        """What is held of the text; values that are not whole are none."""
        out: list[Event] = []
        for choice in self._choices.values():
            choice.flush(out)
        return out

    def _choice(self, choice: int) -> "_Answer | _Sections":
        found = self._choices.get(choice)
        if found is None and self._wish is not None:
            made = _Sections(choice, self._wish) if self._wish.sections else _Answer(choice, self._wish)
            found = self._choices[choice] = made
        assert found is not None
        return found


def _tell(choice: int, text: str, wish: StructuredWish, section: int | None, out: list[Event]) -> None:
    value, problem = wish.read(text)
    if problem is None:
        out.append(Structured(choice, value, wish.schema_name, section))
    else:
        place = f"choice {choice}" if section is None else f"section {section} of choice {choice}"
        out.append(Warned("structured_invalid", f"{place} is no valid value: {problem}"))


class _Answer:
    """The whole answer is the value."""

    def __init__(self, choice: int, wish: StructuredWish) -> None:
        self._choice = choice
        self._wish = wish
        self._pieces: list[str] = []

    def text(self, item: Text, out: list[Event]) -> None:
        self._pieces.append(item.text)
        if self._wish.shows_text:
            out.append(item)
        elif not item.added:
            out.append(Withheld(item.choice, "marker", item.text, item.tokens))

    def finish(self, item: Finished, out: list[Event]) -> None:
        text = "".join(self._pieces)
        if item.reason == "stop":
            _tell(self._choice, text, self._wish, None, out)
        elif item.reason == "tool_calls":
            self._pieces.clear()  # the model speaks again when it has the results
        elif text.strip():
            detail = f"choice {self._choice} is no valid value: it ended with {item.reason!r} before it was whole"
            out.append(Warned("structured_invalid", detail))

    def flush(self, out: list[Event]) -> None:
        pass


class _Sections:
    """What stands between the delimiters are the values; the delimiters themselves are markers."""

    def __init__(self, choice: int, wish: StructuredWish) -> None:
        self._choice = choice
        self._wish = wish
        opening, closing = wish.sections or ("", "")
        self._outside, self._inside = Markers([opening]), Markers([closing])
        self._pieces: list[str] | None = None  # of the open section
        self._count = 0
        self._parts = 0
        self._held = ""
        self._extras = Extras()

    def text(self, item: Text, out: list[Event]) -> None:
        if item.added:
            self._add(item, out)
            return
        self._extras.keep(item)
        text, self._held = self._held + item.text, ""
        while text:
            markers = self._outside if self._pieces is None else self._inside
            found = markers.pattern.search(text)
            if found is None:
                free = len(text) - markers.unfinished(text)
                self._emit(text[:free], out)
                self._held = text[free:]
                return
            self._emit(text[: found.start()], out)
            out.append(Withheld(self._choice, "marker", found.group(), self._extras.take_tokens()))
            self._pass(out)
            text = text[found.end() :]

    def _add(self, item: Text, out: list[Event]) -> None:
        """A placeholder: part of what it stands in, and no delimiter."""
        self.flush(out)
        if self._pieces is not None:
            self._pieces.append(item.text)
        if self._pieces is None or self._wish.shows_text:
            item.section = self._parts
            out.append(item)

    def finish(self, item: Finished, out: list[Event]) -> None:
        self.flush(out)
        if self._pieces is not None:
            detail = f"section {self._count} of choice {self._choice} is no valid value: its end mark is missing"
            out.append(Warned("structured_invalid", detail))
            self._count += 1
            self._pieces = None  # the model may speak again, when it has the results of its calls
        self._extras.give(item)

    def flush(self, out: list[Event]) -> None:
        text, self._held = self._held, ""
        self._emit(text, out)

    def _pass(self, out: list[Event]) -> None:
        self._parts += 1
        if self._pieces is None:
            self._pieces = []
            return
        _tell(self._choice, "".join(self._pieces), self._wish, self._count, out)
        self._count += 1
        self._pieces = None

    def _emit(self, text: str, out: list[Event]) -> None:
        if not text:
            return
        if self._pieces is not None:
            self._pieces.append(text)
            if not self._wish.shows_text:
                out.append(Withheld(self._choice, "marker", text, self._extras.take_tokens()))
                self._extras.forget()
                return
        piece = Text(self._choice, Channel.ANSWER, text, section=self._parts)
        self._extras.give(piece)
        out.append(piece)
