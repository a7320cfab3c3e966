"""What one connection is still to send, bounded in bytes. Who puts something in never waits."""

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from penstock_vllm import frames

DEFAULT_BYTES: Final = 4 * 2**20
SETTING: Final = "PENSTOCK_OUTBOX_BYTES"

# Steps that wait are sent together up to here: what a write hands to the transport is out of our count.
_MOST_MESSAGE_BYTES: Final = 256 * 1024


def most_bytes() -> int:
    """The bound, from PENSTOCK_OUTBOX_BYTES. Raises ValueError where that is no number of bytes."""
    setting = os.environ.get(SETTING, str(DEFAULT_BYTES))
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"{SETTING} is {setting!r}; it must be a number of bytes, 1 or more")
    return int(setting)


class Outbox:
    """Records are put in and committed a step at a time; `next` gives what to send.

    A step that does not fit is dropped whole: `on_lost` is called at once with the numbers of its streams, and each
    is told LOST as soon as there is room. A refusal that does not fit is lost in the same way.
    """

    def __init__(self, most: int, on_lost: Callable[[list[int]], None]) -> None:
        self._most = most
        self._on_lost = on_lost
        self._step: list[bytes] = []
        self._queue: deque[bytes | str] = deque()
        self._lost: list[int] = []
        self._in_flight = 0
        self._ready = asyncio.Event()
        self.waiting_bytes = 0
        self.put = self._step.append

    def commit(self) -> None:
        """What was put since the last call is one whole step."""
        if self._step:
            records = self._step.copy()
            self._step.clear()
            self._add(b"".join(records), map(frames.stream_of, records))

    def put_text(self, stream: int, text: str) -> None:
        """A JSON message of its own, in ASCII, about `stream`."""
        self._add(text, (stream,))

    def _add(self, message: bytes | str, streams: Iterable[int]) -> None:
        if self.waiting_bytes + len(message) > self._most:
            numbers = list(dict.fromkeys(streams))
            self._lost += numbers
            self._on_lost(numbers)
        else:
            self._queue.append(message)
            self.waiting_bytes += len(message)
        self._ready.set()

    async def next(self) -> bytes | str:
        """The next message; waits for one. The call says that the message before has been sent."""
        self.waiting_bytes -= self._in_flight
        self._in_flight = 0
        while True:
            self._tell_lost()
            if self._queue:
                break
            self._ready.clear()
            await self._ready.wait()
        first = self._queue.popleft()
        if isinstance(first, str):
            self._in_flight = len(first)
            return first
        pieces = [first]
        size = len(first)
        while self._queue and isinstance(step := self._queue[0], bytes) and size + len(step) <= _MOST_MESSAGE_BYTES:
            pieces.append(step)
            size += len(step)
            self._queue.popleft()
        self._in_flight = size
        return frames.message(pieces)

    def _tell_lost(self) -> None:
        if self._lost:
            told = b"".join(map(frames.lost, self._lost))
            if not self._queue or self.waiting_bytes + len(told) <= self._most:
                self._lost.clear()
                self._queue.append(told)
                self.waiting_bytes += len(told)
