"""Classifiers beside the stream: windows of what passed the rules, asked about, and what their verdicts do.

A classifier in `async` mode never holds text: a violation ends the stream when its verdict comes. One in `gate` mode
holds text until it was judged. In both modes the finish of a choice waits for the verdicts on it, so that an answer
that was stopped is never told as a success.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.core.errors import PolicyError
from penstock.core.events import (
    Annotation,
    Channel,
    EngineUsage,
    Event,
    Finished,
    Intervention,
    Moderated,
    Opinion,
    Role,
    Text,
    ToolArguments,
    ToolEnded,
    ToolReady,
    ToolStarted,
    Warned,
    Withheld,
)
from penstock.core.rules import RuleChannel


@dataclass(frozen=True, slots=True)
class Watch:
    """One classifier, as the core needs to know it."""

    name: str
    gates: bool
    fails_open: bool
    channels: frozenset[RuleChannel]


@dataclass(frozen=True, slots=True)
class Watching:
    """The classifiers of a stream and the windows they see. Sizes in characters."""

    watches: tuple[Watch, ...]
    window_chars: int
    overlap_chars: int
    window_seconds: float
    gate_chars: int


@dataclass(slots=True)
class Question:
    """A window to be judged by the classifiers at these places of `Watching.watches`."""

    number: int
    choice: int
    channel: RuleChannel
    text: str
    watches: tuple[int, ...]


@dataclass(slots=True)
class _Window:
    """Text of one channel of one choice that no question holds yet, and the end of the last question."""

    pieces: list[str] = field(default_factory=list)
    size: int = 0
    before: str = ""
    since: float = 0.0
    batch: "_Batch | None" = None


@dataclass(slots=True)
class _Batch:
    """Text that is judged together: who has not answered yet, and of those who gates it."""

    open: set[int]
    gating: set[int]
    is_asked: bool = False
    text: str = ""


class Verdicts:
    """The step. `watching` is None where no classifier watches the stream."""

    def __init__(self, watching: Watching | None) -> None:
        self._watching = watching
        self._windows: dict[tuple[int, RuleChannel], _Window] = {}
        self._asked: dict[int, tuple[_Batch, Question]] = {}
        self._questions: list[Question] = []
        self._held: dict[int, deque[tuple[Event, _Batch | None]]] = {}
        self._told_calls: dict[tuple[int, str], list[str]] = {}
        self._notes: list[Intervention] = []
        self._warned: set[str] = set()
        self._number = 0
        self.halted: PolicyError | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a finish waits for a verdict, so that the stream is not over yet."""
        queues = self._held.values() if self.halted is None else ()
        return any(isinstance(item, Finished) for queue in queues for item, _ in queue)

    @property
    def deadline(self) -> float | None:
        """When a window that has not filled is asked about all the same."""
        waiting = [window.since for window in self._windows.values() if window.pieces]
        return min(waiting) + self._watching.window_seconds if waiting and self._watching else None

    def take_questions(self) -> list[Question]:
        questions, self._questions = self._questions, []
        return questions

    def take_notes(self) -> list[Intervention]:
        notes, self._notes = self._notes, []
        return notes

    def feed(self, items: list[Event], now: float) -> list[Event]:
        if self._watching is None:
            return items
        out: list[Event] = []
        for item in items:
            if self.halted is not None:
                self._withhold(item, out)
            else:
                self._one(item, now, out)
        return out

    def due(self, now: float) -> None:
        """Asks about windows that have waited long enough."""
        if self._watching is not None:
            for (choice, channel), window in self._windows.items():
                if window.pieces and now >= window.since + self._watching.window_seconds:
                    self._ask(choice, channel, window)

    def hear(self, number: int, watch: int, opinion: Opinion, category: str) -> list[Event]:
        """What a verdict lets go, or the halt."""
        asked = self._asked.get(number)
        if asked is None or self._watching is None or self.halted is not None:
            return []
        batch, question = asked
        out: list[Event] = []
        who = self._watching.watches[watch]
        if opinion == "violation":
            self._note(question, who.name, category)
            out.append(Moderated("halt", who.name, category, question.choice, back=0, length=0))
            message = f"the answer was stopped by the classifier {who.name} ({category})"
            self._stop(PolicyError("content_filtered", message), out)
            return out
        if opinion == "failed" and not self._goes_on_without(who, question, out):
            return out
        batch.open.discard(watch)
        batch.gating.discard(watch)
        if not batch.open:
            del self._asked[number]
        self._release(question.choice, out)
        return out

    def flush(self) -> list[Event]:
        """The stream ends some other way: what nobody has judged is not sent."""
        out: list[Event] = []
        for queue in self._held.values():
            for item, _ in queue:
                self._withhold(item, out)
            queue.clear()
        return out

    # -- what comes in -----------------------------------------------------------------------------

    def _one(self, item: Event, now: float, out: list[Event]) -> None:
        match item:
            case Text() if not item.added:
                is_thought = item.channel is Channel.REASONING or item.inlined
                self._words(item, item.text, "reasoning" if is_thought else "answer", now, out)
            case ToolArguments():
                self._words(item, item.text, "tools", now, out)
            case Annotation() if item.inline:  # where it has a length, its words stand in the text behind it
                self._words(item, "" if item.length else str(item.data["marker"]), "answer", now, out)
            case Finished():
                self._ask_all(item.choice)
                self._put(item, None, out)
            case ToolStarted() | ToolReady() | ToolEnded():
                self._ask_all(item.choice)
                self._put(item, None, out)
            case EngineUsage() | Withheld() | Role():
                out.append(item)
            case _:
                self._put(item, None, out)

    def _words(
        self, item: Text | ToolArguments | Annotation, text: str, channel: RuleChannel, now: float, out: list[Event]
    ) -> None:
        if item.choice is None:
            return
        window = self._windows.get((item.choice, channel))
        if window is None:
            window = self._windows[item.choice, channel] = _Window()
        if window.batch is None:
            places = self._places(channel)
            gating = {n for n in places if self._watching and self._watching.watches[n].gates}
            window.batch, window.since = _Batch(set(places), gating), now
        for other, that in self._windows.items():
            if other[0] == item.choice and that is not window and that.pieces:
                self._ask(*other, that)
        batch = window.batch
        if batch.open:
            window.pieces.append(text)
            window.size += len(text)
        self._put(item, batch if batch.gating else None, out)
        if self._watching is not None and window.size >= self._watching.window_chars:
            self._ask(item.choice, channel, window)
        if batch.gating:
            self._bound(item.choice, out)

    def _places(self, channel: RuleChannel) -> list[int]:
        watches = self._watching.watches if self._watching else ()
        return [n for n, watch in enumerate(watches) if channel in watch.channels]

    def _put(self, item: Event, batch: _Batch | None, out: list[Event]) -> None:
        choice: int | None = getattr(item, "choice", None)
        if choice is None:
            out.append(item)
            return
        queue = self._held.setdefault(choice, deque())
        queue.append((item, batch))
        self._release(choice, out)

    # -- asking ------------------------------------------------------------------------------------

    def _ask_all(self, choice: int) -> None:
        for (of, channel), window in self._windows.items():
            if of == choice and window.pieces:
                self._ask(choice, channel, window)

    def _ask(self, choice: int, channel: RuleChannel, window: _Window) -> None:
        if self._watching is None or window.batch is None:
            return
        new = "".join(window.pieces)
        batch, text = window.batch, window.before + new
        self._number += 1
        batch.is_asked, batch.text = True, new
        question = Question(self._number, choice, channel, text, tuple(sorted(batch.open)))
        self._asked[self._number] = (batch, question)
        self._questions.append(question)
        overlap = self._watching.overlap_chars
        window.pieces, window.size, window.batch = [], 0, None
        window.before = text[-overlap:] if overlap else ""

    def _goes_on_without(self, who: Watch, question: Question, out: list[Event]) -> bool:
        """A classifier that failed: its policy says whether text goes on unseen."""
        if who.fails_open:
            if who.name not in self._warned:
                self._warned.add(who.name)
                out.append(Warned("classifier_failed", f"the classifier {who.name} did not judge all of this answer"))
            return True
        self._note(question, who.name, "unavailable")
        out.append(Moderated("halt", who.name, "unavailable", question.choice, back=0, length=0))
        message = f"the classifier {who.name} did not judge the answer, and nothing may be said without it"
        self._stop(PolicyError("moderation_unavailable", message, status=503, retryable=True), out)
        return False

    def _note(self, question: Question, name: str, category: str) -> None:
        self._notes.append(Intervention(name, "halt", category, question.choice, question.channel, 0, 0, question.text))

    # -- letting go --------------------------------------------------------------------------------

    def _release(self, choice: int, out: list[Event]) -> None:
        queue = self._held[choice] if choice in self._held else deque()
        while queue:
            item, batch = queue[0]
            if batch is not None and (batch.gating or not batch.is_asked):
                return
            if isinstance(item, Finished) and any(q.choice == choice for _, q in self._asked.values()):
                return
            queue.popleft()
            self._tell(item, out)

    def _tell(self, item: Event, out: list[Event]) -> None:
        if isinstance(item, ToolStarted):
            self._told_calls[item.choice, item.call_id] = []
        elif isinstance(item, ToolArguments):
            self._told_calls[item.choice, item.call_id].append(item.text)
        out.append(item)

    def _bound(self, choice: int, out: list[Event]) -> None:
        """A gate holds so much and no more: what is over it counts as not judged."""
        if self._watching is None or self._size(self._held[choice]) <= self._watching.gate_chars:
            return
        for batch, question in list(self._asked.values()):
            if question.choice != choice or self.halted is not None:
                continue
            for place in list(batch.gating):
                if not self._goes_on_without(self._watching.watches[place], question, out):
                    return
                batch.gating.discard(place)
        self._release(choice, out)

    @staticmethod
    def _size(queue: Iterable[tuple[Event, _Batch | None]]) -> int:
        return sum(_length(item) for item, _ in queue)

    def _stop(self, problem: PolicyError, out: list[Event]) -> None:
        self.halted = problem
        out += self.flush()
        self._asked.clear()

    def _withhold(self, item: Event, out: list[Event]) -> None:
        if isinstance(item, Text | ToolArguments):
            if not item.added:
                out.append(Withheld(item.choice, "moderation", item.text, item.tokens))
        elif isinstance(item, Finished):
            if item.tokens:
                out.append(Withheld(item.choice, "moderation", "", item.tokens))
        elif isinstance(item, ToolEnded):
            told = self._told_calls.get((item.choice, item.call_id))
            if told is not None:
                item.valid, item.status, item.arguments = False, "incomplete", "".join(told)
                item.problem = item.problem or "moderation stopped the answer"
                out.append(item)
        elif isinstance(item, EngineUsage | Withheld) or (isinstance(item, Moderated) and item.action == "halt"):
            out.append(item)


def _length(item: Event) -> int:
    """Characters that an event keeps from the client while it is held."""
    match item:
        case Text() | ToolArguments():
            return len(item.text)
        case Annotation():
            return len(str(item.data.get("marker", "")))
        case _:
            return 0
