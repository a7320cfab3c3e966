"""Text of one field on its way: held while it may be part of a match, then let go, replaced or kept back."""

from collections.abc import Callable
from typing import Literal, Protocol

import orjson

from penstock.core.errors import PolicyError
from penstock.core.events import Event, Intervention, Moderated, Withheld
from penstock.core.folding import View, ends_in_string, is_plain, view_of
from penstock.core.rules import Rule, Scan, Scanner, Span

JsonIn = Literal["none", "all", "parts"]
"""Whether an answer is JSON: its escapes must be read as what they stand for wherever somebody will read JSON."""


class LaneOwner(Protocol):
    """Who is told what was done, and says how many characters may be held."""

    halted: PolicyError | None

    @property
    def most_held(self) -> int: ...

    def note(self, intervention: Intervention) -> None: ...

    def halt(self, problem: PolicyError) -> None: ...


class Lane:
    """One field of one choice. Positions are characters that the model wrote, counted from the lane's beginning.

    `_window` is text from `_base` on: what is held, what may still be part of a flagged match, and one character
    before it as context. All before `_sent` has gone out, or was withheld for good.
    """

    __slots__ = (
        "_base", "_choice", "_covered", "_flagged", "_has_context", "_in_string", "_is_json", "_is_value", "_marks",
        "_name", "_owner", "_scanner", "_sent", "_speak", "_tokens", "_window", "changed", "is_written_here",
    )  # fmt: skip

    def __init__(
        self,
        owner: LaneOwner,
        scanner: Scanner,
        choice: int,
        name: str,
        speak: Callable[[str, int, bool], Event],
        *,
        json: JsonIn,
    ) -> None:
        self._owner = owner
        self._scanner = scanner
        self._choice = choice
        self._name = name
        self._speak = speak
        self._is_json = json != "none"
        self._is_value = json == "all"
        self._window = ""
        self._base = 0
        self._sent = 0
        self._has_context = False
        self._in_string = False
        self._covered = -1  # where the last redaction ends, so that one that overlaps needs no second placeholder
        self._flagged: dict[str, int] = {}
        self._marks: list[tuple[int, int]] = []  # position up to which some tokens were paid, and how many
        self._tokens = 0
        self.changed = False
        self.is_written_here = False
        """Whether the text is not the model's own spelling, which was counted elsewhere: JSON made of its XML."""

    def begin_after(self, text: str) -> None:
        """A match that is whole in `text` is its author's own; one that only begins there is looked for."""
        view, scan = self._look_at_begun(text)
        while scan is not None and scan.halt is not None:
            text = text[view.end(scan.halt.end) :]
            view, scan = self._look_at_begun(text)
        self._window, self._base = text, -len(text)
        self._forget(view.start(len(view.text) - scan.kept) if scan and scan.kept else view.read, view)

    def _look_at_begun(self, text: str) -> tuple[View, Scan | None]:
        view = view_of(text, json=self._is_json, whole=False)
        return view, self._scanner.scan(view.text, first=0, whole=False) if view.text else None

    @property
    def is_holding(self) -> bool:
        return self._base + len(self._window) > self._sent

    def feed(self, text: str, tokens: int, item: Event, out: list[Event]) -> None:
        """`item` is the event that brought the text: where nothing is held and nothing found, it goes on itself."""
        was_idle = not self.is_holding
        window = self._window = self._window + text
        if is_plain(window) and not (self._is_json and "\\" in window):
            view = View(window, None, None, len(window))
        else:
            view = view_of(window, json=self._is_json, whole=False)
        first = int(self._has_context)
        scan = self._scanner.scan(view.text, first=first, whole=False) if len(view.text) > first else None
        if scan is None and was_idle and not self._is_json and view.starts is None:
            self._base += len(window) - 1
            self._sent = self._base + 1
            self._window = window[-1]
            self._has_context = True
            self._tokens += tokens
            out.append(item)
            return
        if tokens:
            self._marks.append((self._base + len(window), tokens))
        self._advance(view, scan, out, whole=False)

    def take_whole(self, text: str, out: list[Event]) -> None:
        """All that this lane will ever see."""
        self._window = text
        self.settle(out)

    def settle(self, out: list[Event]) -> None:
        """Nothing may be held any longer. What comes later is still seen together with the end of this."""
        view, scan = self._last_look()
        self._advance(view, scan, out, whole=True)

    def break_off(self, out: list[Event]) -> None:
        """No more comes, and the end is not the text's own: what may have become part of a match stays here."""
        view, scan = self._last_look()
        held_from = view.start(len(view.text) - scan.held) if scan and scan.held else len(self._window)
        self._advance(view, scan, out, whole=True, until=held_from)
        if self._owner.halted is None and scan is not None:
            for span in scan.spans:
                if view.start(span.start) >= held_from and span.rule.action == "redact":
                    start, end = view.start(span.start), view.end(span.end)
                    self._note(span.rule.id, "redact", span.rule.category, start, self._window[start:end])
        if self.is_holding:
            self.withhold(out)

    def withhold(self, out: list[Event]) -> None:
        """Another lane was halted, or the stream broke: what is held here is not sent either."""
        self._keep_back(self._sent - self._base, len(self._window), out)
        self._sent = self._base + len(self._window)

    def _last_look(self) -> tuple[View, Scan | None]:
        view = view_of(self._window, json=self._is_json, whole=True)
        first = int(self._has_context)
        scan = self._scanner.scan(view.text, first=first, whole=True) if len(view.text) > first else None
        return view, scan

    def _advance(
        self, view: View, scan: Scan | None, out: list[Event], *, whole: bool, until: int | None = None
    ) -> None:
        """Lets go of what can be no part of a match; with `whole` of everything, up to `until` if that is given."""
        spans = scan.spans if scan else []
        size, length = len(self._window), len(view.text)
        free = size if whole else view.start(length - scan.held) if scan and scan.held else view.read
        free = free if until is None else until
        if scan is not None and scan.halt is not None:
            free = min(free, view.start(scan.stop))
        if not whole and size - free > self._owner.most_held:
            # No rule is that wide: invisible characters pad the text, and what they may hide is not sent.
            return self._halt_for_padding(free, out)
        cursor = self._sent - self._base
        kept = view.start(length - scan.kept) if scan and scan.kept else view.read
        for span in spans:
            start, end = view.start(span.start), view.end(span.end)
            if start >= free:
                break
            if span.rule.action != "flag":
                cursor = self._redact(span.rule, start, end, cursor, out)
            elif start < kept or whole:  # else it may still grow
                cuts = (view.start(s.start) for s in spans if s.rule.action != "flag" and view.end(s.end) > cursor)
                cursor = self._flag(span.rule, start, end, cursor, min(end, free, *cuts), out)
        if free > cursor:
            self._say(cursor, free, out)
            cursor = free
        self._sent = self._base + cursor
        if scan is not None and scan.halt is not None:
            return self._halt(scan.halt, view.start(scan.halt.start), view.end(scan.halt.end), out)
        # What is flagged was sent, so one that is padded without end may be missed.
        is_padded = cursor - kept > self._owner.most_held
        self._forget(cursor if is_padded else min(kept, cursor), view)
        return None

    def _flag(self, rule: Rule, start: int, end: int, cursor: int, until: int, out: list[Event]) -> int:
        if self._base + start <= self._flagged.get(rule.id, -1):
            return cursor
        self._flagged[rule.id] = self._base + start
        if until > cursor:
            self._say(cursor, until, out)
            cursor = until
        self._note(rule.id, "flag", rule.category, start, self._window[start:end])
        back = max(cursor - start, 0)
        out.append(Moderated("flag", rule.id, rule.category, self._choice, back=back, length=min(end - start, back)))
        return cursor

    def _redact(self, rule: Rule, start: int, end: int, cursor: int, out: list[Event]) -> int:
        base = self._base
        if end <= cursor:
            return cursor
        if start > cursor:
            self._say(cursor, start, out)
        begun = max(start, cursor)
        self._note(rule.id, "redact", rule.category, start, self._window[start:end])
        self.changed = True
        if base + begun != self._covered:
            placeholder = self._placeholder(rule.placeholder, begun)
            out.append(self._speak(placeholder, 0, True))
            size = len(placeholder)
            out.append(Moderated("redact", rule.id, rule.category, self._choice, back=size, length=size))
        self._keep_back(begun, end, out)
        self._covered = base + end
        return end

    def _placeholder(self, text: str, at: int) -> str:
        """Within JSON the placeholder stays a string, or becomes one in the place of a number."""
        if not self._is_json:
            return text
        quoted = orjson.dumps(text).decode()
        is_inside = not self._is_value or ends_in_string(self._window[:at], begins_in_string=self._in_string)
        return quoted[1:-1] if is_inside else quoted

    def _say(self, start: int, end: int, out: list[Event]) -> None:
        out.append(self._speak(self._window[start:end], self._take_tokens(self._base + end), False))

    def _keep_back(self, start: int, end: int, out: list[Event]) -> None:
        text = "" if self.is_written_here else self._window[start:end]
        out.append(Withheld(self._choice, "moderation", text, self._take_tokens(self._base + end)))

    def _take_tokens(self, until: int) -> int:
        """The tokens of all text up to `until` that no event has carried yet."""
        tokens = 0
        while self._marks and self._marks[0][0] <= until:
            tokens += self._marks.pop(0)[1]
        self._tokens += tokens
        return tokens

    def _forget(self, place: int, view: View) -> None:
        """Drops what stands before `place` but for one visible character, the context of what follows.

        Invisible ones between the two are dropped as well, or they would pile up without end.
        """
        start, end = view.last_before(place)
        if self._is_json:
            self._in_string = ends_in_string(self._window[:start], begins_in_string=self._in_string)
        self._base += place - end + start
        self._window = self._window[start:] if end == place else self._window[start:end] + self._window[place:]
        self._has_context = end > start

    def _note(self, rule: str, action: str, category: str, start: int, text: str) -> None:
        begun = max(self._base + start, 0)
        self._owner.note(Intervention(rule, action, category, self._choice, self._name, begun, self._tokens, text))

    def _halt(self, span: Span, start: int, end: int, out: list[Event]) -> None:
        rule = span.rule
        self._note(rule.id, "halt", rule.category, start, self._window[start:end])
        self._stop(rule.id, rule.category, f"the answer was stopped by the rule {rule.id} ({rule.category})", out)

    def _halt_for_padding(self, start: int, out: list[Event]) -> None:
        self._note("hold_limit", "halt", "evasion", start, self._window[start:])
        message = (
            f"more than {self._owner.most_held} characters would have to be held (moderation.hold_chars): invisible "
            "characters or escapes pad what may become a match"
        )
        self._stop("hold_limit", "evasion", message, out)

    def _stop(self, rule: str, category: str, message: str, out: list[Event]) -> None:
        out.append(Moderated("halt", rule, category, self._choice, back=0, length=0))
        self.withhold(out)
        self.changed = True
        self._owner.halt(PolicyError("content_filtered", message))
