"""Token ids -> runs of one channel, by the family's table that came with the request.

A marker that the tokenizer has as an added token is met by its id: one dictionary lookup a token. Any other marker
is met by its text, however the model spells it in tokens; there, ids whose text may be the beginning of a marker
are held until that is decided, never more of them than the longest marker has bytes.
"""

import json
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, Protocol

from penstock_vllm.frames import MOST_STATE_BYTES, Channel

Run = tuple[int, Sequence[int]]

# How far back the beginning of the last turn is looked for; a template's own opening is some ten ids long.
_MOST_TURN_IDS: Final = 4096
# How much of a header is kept to decide by, as on the sidecar's side of the table.
_MOST_HEADER_BYTES: Final = 512
# A family is configuration; what is larger is none.
_MOST_STATES: Final = 64
_MOST_MARKERS: Final = 64
_MOST_MARKER_BYTES: Final = 256
_MOST_TABLES: Final = 32


class FamilyError(ValueError):
    """The family that came with a request cannot be used; the text says why."""


class Vocabulary(Protocol):
    @property
    def special(self) -> Collection[int]:
        """The ids that stand for no text: beginnings and ends of turns, among others."""

    def added_id(self, text: str) -> int | None:
        """The id of the added token that is written so, or None where the text is spelled by ordinary tokens."""

    def piece(self, token_id: int) -> bytes:
        """The bytes that this id adds to the text: a special token's own name, nothing where there is no such id."""

    def prompt_end(self, prompt: Sequence[int], *, skips_special: bool) -> Sequence[int]:
        """As much of the prompt's end as settles how the first generated token is written."""


# What a lookup says of an id: an ordinary one gives None, a marker's the state that it leads to, and this is for an
# id that must be read as text.
_AS_TEXT: Final = object()


def _ordinary(_token_id: int) -> object:
    return None


class _State:
    """One state of a family. `look` answers for one id: None, `_AS_TEXT`, or the state that it leads to."""

    def __init__(self, name: str, channel: str) -> None:
        self.name = name
        self.collects = channel == "markup"
        self.channel = Channel.MARKER if self.collects else Channel[channel.upper()]
        self.otherwise: _State | None = None
        self.headers: list[tuple[re.Pattern[str], _State]] = []
        self.spelled: dict[bytes, _State] = {}
        self.look: Callable[[int], object] = _ordinary

    @cached_property
    def pattern(self) -> re.Pattern[bytes] | None:
        longest_first = sorted(self.spelled, key=len, reverse=True)
        return re.compile(b"|".join(map(re.escape, longest_first))) if self.spelled else None

    @cached_property
    def most_held(self) -> int:
        return max(map(len, self.spelled), default=0)

    @cached_property
    def _beginnings(self) -> frozenset[bytes]:
        return frozenset(marker[:end] for marker in self.spelled for end in range(1, len(marker)))

    def unfinished(self, text: bytes) -> int:
        """Length of the longest end of `text` that may still become a marker."""
        for length in range(min(len(text), self.most_held - 1), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0

    def after_header(self, header: bytes, default: "_State") -> "_State":
        if self.headers:
            text = header.decode(errors="replace")
            for pattern, state in self.headers:
                if pattern.search(text):
                    return state
        return default


class _Looks(dict[int, object]):
    """The lookups of a state that reads text, filled as ids come up."""

    def __init__(self, state: _State, by_id: Mapping[int, _State], piece: Callable[[int], bytes]) -> None:
        super().__init__(by_id)
        self._state = state
        self._piece = piece

    def __missing__(self, token_id: int) -> object:
        state, text = self._state, self._piece(token_id)
        matters = (
            state.collects
            or (state.otherwise is not None and bool(text.strip()))
            or (state.pattern is not None and (state.unfinished(text) or state.pattern.search(text) is not None))
        )
        action = self[token_id] = _AS_TEXT if matters else None
        return action


class Table:
    """A family over one vocabulary. Raises `FamilyError` for a family that makes no sense."""

    def __init__(self, family: Mapping[str, Any], vocabulary: Vocabulary) -> None:
        self.piece = vocabulary.piece
        self.prompt_end = vocabulary.prompt_end
        described = _described(family)
        self._states = {name: _State(name, state["channel"]) for name, state in described.items()}
        marker_ids: set[int] = set()
        for name, state in described.items():
            by_id = self._connect(self._states[name], state, vocabulary)
            marker_ids.update(by_id)
        self._start = self._state(family.get("start"))
        if twice := [state.name for state in self._states.values() if state.otherwise and state.otherwise.otherwise]:
            raise FamilyError(f"the `otherwise` of {twice} leads to a state with an `otherwise` of its own")
        self._turn_starts = frozenset(vocabulary.special) - marker_ids

    def tagger(self, prompt: Sequence[int]) -> "Tagger":
        """A tagger for what follows `prompt`: its last turn may have opened a channel already."""
        walked = Tagger(self.piece, self._start, walks=True)
        walked.feed(self._last_turn(prompt))
        return walked.fork()

    def _last_turn(self, prompt: Sequence[int]) -> Sequence[int]:
        first = max(0, len(prompt) - _MOST_TURN_IDS)
        for position in range(len(prompt) - 1, first - 1, -1):
            if prompt[position] in self._turn_starts:
                return prompt[position + 1 :]
        return prompt[first:]

    def _connect(self, state: _State, described: Mapping[str, Any], vocabulary: Vocabulary) -> dict[int, _State]:
        by_id: dict[int, _State] = {}
        for marker, target in described["on"].items():
            token_id = vocabulary.added_id(marker)
            if token_id is None:
                state.spelled[marker.encode()] = self._state(target)
            else:
                by_id[token_id] = self._state(target)
        rules = described["headers"] if state.collects else []
        state.headers = [(_compiled(pattern), self._state(target)) for pattern, target in rules]
        state.otherwise = None if described["otherwise"] is None else self._state(described["otherwise"])
        reads = state.collects or state.spelled or state.otherwise is not None
        state.look = _Looks(state, by_id, self.piece).__getitem__ if reads else by_id.get
        return by_id

    def _state(self, name: object) -> _State:
        state = self._states.get(name) if isinstance(name, str) else None
        if state is None:
            raise FamilyError(f"the family leads to a state that it does not have: {name!r}")
        return state


class Tagger:
    """Parts the ids of one choice. Ids go in once and in order, and come out once and in order."""

    __slots__ = ("_ends", "_header", "_held", "_look", "_piece", "_state", "_tail", "_walks")

    def __init__(self, piece: Callable[[int], bytes], state: _State, *, walks: bool = False) -> None:
        self._piece = piece
        self._state = state
        self._look = state.look
        # The text that may still become a marker, the ids not yet given out, and where in the text each of them ends.
        self._tail = b""
        self._held: list[int] = []
        self._ends: list[int] = []
        self._header = b""
        # A prompt's own words (a role's name) are no answer, so they do not leave a state for its `otherwise`.
        self._walks = walks

    @property
    def state_name(self) -> str:
        """The family's name of the state that it is in."""
        return self._state.name

    def fork(self) -> "Tagger":
        """Another one in the same state, with nothing to give out: each choice goes its own way from the prompt."""
        other = Tagger(self._piece, self._state)
        other._tail, other._header = self._tail, self._header
        return other

    def feed(self, ids: Sequence[int]) -> Sequence[Run]:
        if len(ids) == 1 and not self._tail and self._look(ids[0]) is None:
            return ((self._state.channel, ids),)
        runs = _Runs()
        for token_id in ids:
            self._take(token_id, runs)
        return runs

    def finish(self, ids: Sequence[int], *, ended_by_token: bool) -> Sequence[Run]:
        """The last ids of the choice, and all that is held. With `ended_by_token` the last of them is a marker."""
        runs = _Runs()
        for token_id in ids[:-1] if ended_by_token else ids:
            self._take(token_id, runs)
        self._settle(runs)
        if ended_by_token and ids:
            runs.put(Channel.MARKER, ids[-1:])
        return runs

    def _take(self, token_id: int, runs: "_Runs") -> None:
        action = self._look(token_id)
        if isinstance(action, _State) or (action is _AS_TEXT and self._is_marker_of_otherwise(token_id)):
            self._settle(runs)
            if self._is_marker_of_otherwise(token_id):
                self._leaves(self._piece(token_id))
            action = self._look(token_id)
        if isinstance(action, _State):
            runs.put(Channel.MARKER, (token_id,))
            self._pass_marker(action)
        elif action is _AS_TEXT or self._tail:
            self._read(token_id, runs)
        else:
            runs.put(self._state.channel, (token_id,))

    def _is_marker_of_otherwise(self, token_id: int) -> bool:
        """Whether this marker is none here, but is one in the state that it leads to by being none."""
        other = self._state.otherwise
        return other is not None and isinstance(other.look(token_id), _State) and self._look(token_id) is _AS_TEXT

    def _read(self, token_id: int, runs: "_Runs") -> None:
        self._tail += self._piece(token_id)
        self._held.append(token_id)
        self._ends.append(len(self._tail))
        while True:
            state = self._state
            found = state.pattern.search(self._tail) if state.pattern is not None else None
            free = found.start() if found else len(self._tail) - state.unfinished(self._tail)
            if self._leaves(self._tail[:free]):
                continue
            self._release(free, runs)
            if found is None:
                break
            self._drop_marker(found.end() - found.start(), runs)
            self._pass_marker(state.spelled[found.group()])
        self._hold_no_more_than(self._state.most_held, runs)

    def _leaves(self, text: bytes) -> bool:
        """Whether `text` is not what the state waits for before a block, so that it gives way to its `otherwise`."""
        if self._state.otherwise is None or self._walks or not text.strip():
            return False
        self._enter(self._state.otherwise)
        return True

    def _release(self, until: int, runs: "_Runs") -> None:
        """The text before `until` was no marker: gives out the ids that end there."""
        if self._state.collects:
            self._header = (self._header + self._tail[:until])[:_MOST_HEADER_BYTES]
        self._cut(until, bisect_right(self._ends, until), self._state.channel, runs)

    def _drop_marker(self, size: int, runs: "_Runs") -> None:
        """The text begins with a marker of `size` bytes: gives out every id that has a part in it."""
        count = bisect_right(self._ends, size)
        if count < len(self._ends) and (self._ends[count - 1] if count else 0) < size:
            count += 1
        self._cut(size, count, Channel.MARKER, runs)

    def _cut(self, size: int, count: int, channel: int, runs: "_Runs") -> None:
        if count:
            runs.put(channel, self._held[:count])
        self._tail = self._tail[size:]
        self._held = self._held[count:]
        self._ends = [end - size for end in self._ends[count:]]

    def _settle(self, runs: "_Runs") -> None:
        """What is held was no marker."""
        if self._tail:
            self._leaves(self._tail)
            self._release(len(self._tail), runs)

    def _hold_no_more_than(self, most: int, runs: "_Runs") -> None:
        # Only ids without any text can be more than the bytes of a marker.
        surplus = len(self._held) - most
        if surplus > 0:
            runs.put(self._state.channel, self._held[:surplus])
            self._held, self._ends = self._held[surplus:], self._ends[surplus:]

    def _pass_marker(self, target: _State) -> None:
        self._enter(self._state.after_header(self._header, target))

    def _enter(self, state: _State) -> None:
        self._state = state
        self._look = state.look
        self._header = b""


class _Runs(list[Run]):
    def put(self, channel: int, ids: Sequence[int]) -> None:
        """Neighbours of one channel become one run."""
        if self and self[-1][0] == channel:
            self[-1] = (channel, [*self[-1][1], *ids])
        else:
            self.append((channel, ids))


class Tables:
    """The tables in use, one per family that sidecars send; the least used goes when there are many."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tables: OrderedDict[str, Table] = OrderedDict()

    def table(self, family: Mapping[str, Any]) -> Table:
        """Raises `FamilyError`."""
        key = json.dumps(family, sort_keys=True)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = Table(family, self._vocabulary)
            if len(self._tables) > _MOST_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return table


def _described(family: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The states as they must be, or `FamilyError`: they come from outside."""
    states = family.get("states")
    if not isinstance(states, dict) or not 0 < len(states) <= _MOST_STATES:
        raise FamilyError(f"a family has from 1 to {_MOST_STATES} states")
    if any(len(name.encode(errors="replace")) > MOST_STATE_BYTES for name in states):
        raise FamilyError(f"the name of a state is longer than {MOST_STATE_BYTES} bytes")
    return {name: _described_state(name, state) for name, state in states.items()}


def _described_state(name: str, state: object) -> dict[str, Any]:
    if not isinstance(state, dict) or state.get("channel") not in ("answer", "reasoning", "tool", "markup"):
        raise FamilyError(f"state {name!r} has no channel of answer, reasoning, tool, markup")
    markers, headers = state.get("on") or {}, state.get("headers") or []
    if not isinstance(markers, dict) or len(markers) > _MOST_MARKERS:
        raise FamilyError(f"state {name!r} has more than {_MOST_MARKERS} markers, or none that can be read")
    if not all(0 < len(marker.encode(errors="replace")) <= _MOST_MARKER_BYTES for marker in markers):
        raise FamilyError(f"a marker of state {name!r} is empty or longer than {_MOST_MARKER_BYTES} bytes")
    if not isinstance(headers, list) or not all(_is_pair(rule) for rule in headers):
        raise FamilyError(f"the headers of state {name!r} are not pairs of a pattern and a state")
    return {"channel": state["channel"], "on": markers, "headers": headers, "otherwise": state.get("otherwise")}


def _is_pair(rule: object) -> bool:
    return isinstance(rule, list) and len(rule) == 2 and all(isinstance(part, str) for part in rule)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise FamilyError(f"the header pattern {pattern!r} is no regular expression: {error}") from None
