"""Numbers the blocks of each choice and keeps their order: role first, one text block open, every block closed."""

from penstock.core.events import (
    Annotation,
    BlockEnded,
    BlockStarted,
    BlockStatus,
    Channel,
    Event,
    Finished,
    Moderated,
    Role,
    Structured,
    Text,
    ToolArguments,
    ToolDenied,
    ToolEnded,
    ToolProgress,
    ToolReady,
    ToolResult,
    ToolStarted,
    utf8_size,
)


class Blocks:
    """The step: gives every piece its block and adds the starts and ends (guarantees G3, G4, G5)."""

    def __init__(self) -> None:
        self._choices: dict[int, _ChoiceBlocks] = {}
        self._reasons: dict[int, str] = {}

    @property
    def finish_reasons(self) -> list[str]:
        """The reasons told so far, by choice."""
        return [self._reasons[choice] for choice in sorted(self._reasons)]

    def is_finished(self, choice: int) -> bool:
        return choice in self._reasons

    def feed(self, items: list[Event]) -> list[Event]:
        out: list[Event] = []
        for item in items:
            match item:
                case Text():
                    self._choice(item.choice).text(item, out)
                case Role() if item.choice in self._reasons:
                    continue  # our own stop string finished this choice before the engine named its role
                case Role():
                    self._choice(item.choice).speak(item, out)
                case ToolStarted():
                    self._choice(item.choice).tool_started(item, out)
                case ToolArguments():
                    self._choice(item.choice).arguments(item, out)
                case Structured():
                    self._choice(item.choice).close_text(out)
                    out.append(item)
                case Annotation(inline=True, choice=int() as choice):
                    self._choice(choice).anchor(item, out)
                case ToolProgress():
                    self._choice(item.choice).close_text(out)  # what the model says next is a block of its own
                    item.block = self._choice(item.choice).block_of(item.call_id)
                    out.append(item)
                case ToolReady() | ToolEnded() | ToolDenied() | ToolResult():
                    item.block = self._choice(item.choice).block_of(item.call_id)
                    out.append(item)
                case Moderated():
                    self._choice(item.choice).moderated(item, out)
                case Finished() if item.choice in self._reasons:
                    continue  # one finish a choice, whatever the engine repeats
                case Finished():
                    self._choice(item.choice).finish("incomplete" if item.reason == "length" else "complete", out)
                    self._reasons[item.choice] = item.reason
                    out.append(item)
                case _:
                    out.append(item)
        return out

    def break_off(self) -> list[Event]:
        """Closes what is open because the stream failed; the finishes follow as ordinary events."""
        out: list[Event] = []
        for choice in self._choices.values():
            choice.finish("incomplete", out)
        return out

    def _choice(self, choice: int) -> "_ChoiceBlocks":
        found = self._choices.get(choice)
        if found is None:
            found = self._choices[choice] = _ChoiceBlocks(choice)
        return found


class _ChoiceBlocks:
    def __init__(self, choice: int) -> None:
        self._choice = choice
        self._next_block = 0
        self._text_block = 0
        self._role_told = False
        self._open: Channel | None = None
        self._size = 0
        self._chars = 0
        self._tokens = 0
        self._tools: dict[str, int] = {}
        self._argument_chars: dict[str, int] = {}
        self._section = 0

    def speak(self, item: Role | None, out: list[Event]) -> None:
        """A role once, before all blocks; an engine that names none speaks as the assistant."""
        if not self._role_told:
            self._role_told = True
            out.append(item or Role(self._choice, "assistant"))

    def text(self, item: Text, out: list[Event]) -> None:
        if self._open is not item.channel or self._section != item.section:
            self._start(item.channel, out)
            self._section = item.section
        item.block = self._text_block
        self._size += utf8_size(item.text)
        self._chars += len(item.text)
        self._tokens += item.tokens
        out.append(item)

    def anchor(self, item: Annotation, out: list[Event]) -> None:
        """A citation stands where the text of its block has come to; it may be the first thing in it."""
        if self._open is not Channel.ANSWER:
            self._start(Channel.ANSWER, out)
        place = {"choice": self._choice, "block": self._text_block, "offset": self._chars}
        item.anchor = {**place, "length": item.length}
        out.append(item)

    def close_text(self, out: list[Event]) -> None:
        """A final value follows the text that it was read from; the next text is another block."""
        self.speak(None, out)
        self._close("complete", out)

    def tool_started(self, item: ToolStarted, out: list[Event]) -> None:
        self.speak(None, out)
        self._close("complete", out)
        item.block = self._tools[item.call_id] = self._number()
        out.append(item)

    def block_of(self, call_id: str) -> int:
        return self._tools[call_id]

    def arguments(self, item: ToolArguments, out: list[Event]) -> None:
        item.block = self._tools[item.call_id]
        self._argument_chars[item.call_id] = self._argument_chars.get(item.call_id, 0) + len(item.text)
        out.append(item)

    def moderated(self, item: Moderated, out: list[Event]) -> None:
        """In the block that is open, or the call it names; before the first block it has none."""
        if item.call_id is not None:
            item.block, shown = self._tools[item.call_id], self._argument_chars.get(item.call_id, 0)
        else:
            item.block, shown = (self._text_block, self._chars) if self._open else (None, 0)
        self.speak(None, out)
        item.offset = max(shown - item.back, 0)
        out.append(item)

    def finish(self, status: BlockStatus, out: list[Event]) -> None:
        self._close(status, out)

    def _start(self, channel: Channel, out: list[Event]) -> None:
        self.speak(None, out)
        self._close("complete", out)
        self._open = channel
        self._text_block = self._number()
        out.append(BlockStarted(self._choice, self._text_block, channel))

    def _close(self, status: BlockStatus, out: list[Event]) -> None:
        if self._open is not None:
            out.append(BlockEnded(self._choice, self._text_block, self._open, self._size, self._tokens, status))
            self._open, self._size, self._chars, self._tokens = None, 0, 0, 0

    def _number(self) -> int:
        self._next_block += 1
        return self._next_block - 1
