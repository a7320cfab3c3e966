"""Citations in the answer -> annotations: held until the marker is whole, no longer than it can still become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import regex

from penstock.core.events import Annotation, Channel, Event, Extra, Finished, Role, Text, Withheld
from penstock.core.extras import Extras
from penstock.core.markers import Markers

_PATTERN_SECONDS = 0.05


@dataclass(frozen=True)
class CitationPattern:
    """A marker is `opening`, something that `body` matches whole, and `closing`; at most `longest` characters.

    `keeps` leaves the marker in the text. Named groups of `body` go into the annotation's data.
    """

    opening: str
    closing: str
    body: str = "[^\\[\\]]+"
    kind: str = "citation"
    keeps: bool = False
    longest: int = 256

    def __post_init__(self) -> None:
        if not self.opening or not self.closing:
            raise ValueError("a citation needs an opening and a closing")
        regex.compile(self.body)

    def may_become(self, text: str) -> bool:
        """Whether `text`, what follows the opening, may still become the rest of a marker."""
        if len(self.opening) + len(text) >= self.longest:
            return False
        try:
            return (
                regex.fullmatch(
                    f"(?:{self.body})(?:{regex.escape(self.closing)})", text, partial=True, timeout=_PATTERN_SECONDS
                )
                is not None
            )
        except TimeoutError:
            return False

    def match(self, text: str) -> tuple[int, dict[str, str]] | None:
        """The length of the marker's rest at the beginning of `text`, and what it says; None where there is none."""
        end = text.find(self.closing)
        while end >= 0 and len(self.opening) + end + len(self.closing) <= self.longest:
            body = text[:end]
            if (found := self._read(body)) is not None:
                groups = {name: value for name, value in found.groupdict().items() if value is not None}
                return end + len(self.closing), {"text": body, **groups}
            end = text.find(self.closing, end + 1)
        return None

    def _read(self, body: str) -> "regex.Match[str] | None":
        try:
            return regex.fullmatch(self.body, body, timeout=_PATTERN_SECONDS)
        except TimeoutError:
            return None


class Citations:
    """The step. Only the answer is searched."""

    def __init__(self, patterns: Sequence[CitationPattern]) -> None:
        self._patterns = {pattern.opening: pattern for pattern in patterns}
        self._openings = Markers(self._patterns)
        self._choices: dict[int, _ChoiceCitations] = {}

    def feed(self, items: list[Event]) -> list[Event]:
        if not self._patterns:
            return items
        out: list[Event] = []
        for item in items:
            if isinstance(item, Text) and item.channel is Channel.ANSWER and not (item.added or item.inlined):
                self._choice(item.choice).text(item, out)
            else:
                self._settle(item, out)
                out.append(item)
        return out

    def flush(self) -> list[Event]:
        out: list[Event] = []
        for choice in self._choices.values():
            choice.release(out)
        return out

    def _settle(self, item: Event, out: list[Event]) -> None:
        """Something else of a choice follows its text, so what is held of that is no marker."""
        choice = getattr(item, "choice", None)
        found = None if choice is None else self._choices.get(choice)
        if found is not None and not isinstance(item, Role | Extra):
            found.release(out)
            if isinstance(item, Finished):
                found.finish(item)

    def _choice(self, choice: int) -> "_ChoiceCitations":
        found = self._choices.get(choice)
        if found is None:
            found = self._choices[choice] = _ChoiceCitations(choice, self._patterns, self._openings)
        return found


class _ChoiceCitations:
    def __init__(self, choice: int, patterns: Mapping[str, CitationPattern], openings: Markers) -> None:
        self._choice = choice
        self._patterns = patterns
        self._openings = openings
        self._held = ""
        self._is_refusal = False
        self._extras = Extras()

    def text(self, item: Text, out: list[Event]) -> None:
        if not self._held and self._openings.are_excluded_by(item.text):
            self._extras.give(item)
            out.append(item)
            return
        if item.refusal is not self._is_refusal:
            self.release(out)
            self._is_refusal = item.refusal
        self._extras.keep(item)
        self._held = self._scan(self._held + item.text, out, is_last=False)

    def release(self, out: list[Event]) -> None:
        """Something else follows, so what is held is no marker."""
        held, self._held = self._held, ""
        self._scan(held, out, is_last=True)

    def finish(self, item: Finished) -> None:
        self._extras.give(item)

    def _scan(self, text: str, out: list[Event], *, is_last: bool) -> str:
        while found := self._openings.pattern.search(text):
            rest = text[found.end() :]
            pattern = self._patterns[found.group()]
            marker = pattern.match(rest)
            if marker is None and not is_last and pattern.may_become(rest):
                self._emit(text[: found.start()], out)
                return text[found.start() :]
            if marker is None:
                self._emit(text[: found.end()], out)
                text = rest
                continue
            self._emit(text[: found.start()], out)
            length, data = marker
            self._cite(pattern, found.group() + rest[:length], data, out)
            text = rest[length:]
        free = len(text) if is_last else len(text) - self._openings.unfinished(text)
        self._emit(text[:free], out)
        return text[free:]

    def _cite(self, pattern: CitationPattern, marker: str, data: dict[str, str], out: list[Event]) -> None:
        kept = len(marker) if pattern.keeps else 0
        out.append(Annotation(pattern.kind, {"marker": marker, **data}, self._choice, inline=True, length=kept))
        if pattern.keeps:
            self._emit(marker, out)
        else:
            out.append(Withheld(self._choice, "marker", marker, self._extras.take_tokens()))

    def _emit(self, text: str, out: list[Event]) -> None:
        if text:
            piece = Text(self._choice, Channel.ANSWER, text, refusal=self._is_refusal)
            self._extras.give(piece)
            out.append(piece)
