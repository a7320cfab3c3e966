"""A sidecar of the simplest kind: it speaks the contract of `docs/reference/frames.md` to a real engine."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import aiohttp

from penstock.core.frames import Begin, End, EngineFailed, Finish, Lost, Record, Tokens, read_message

Json = dict[str, Any]

PATIENCE_SECONDS: Final = 30.0

QWEN: Final[Json] = {
    "start": "opening",
    "states": {
        "opening": {
            "channel": "answer",
            "on": {"<think>": "reasoning", "<tool_call>": "tool"},
            "otherwise": "answer",
        },
        "answer": {"channel": "answer", "on": {"<tool_call>": "tool"}},
        "reasoning": {"channel": "reasoning", "on": {"</think>": "opening"}},
        "tool": {"channel": "tool", "on": {"</tool_call>": "opening"}},
    },
}


class PluginClient:
    """One WebSocket. What is heard is kept by stream; streams are numbered from 1."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.records: dict[int, list[Record]] = {}
        self.refusals: dict[int, Json] = {}
        self.messages = 0
        self.heard_at: list[float] = []
        """When each message came, by the loop's clock."""
        self._numbers = 0
        self._heard = asyncio.Condition()

    async def open(self, headers: Mapping[str, str] | None = None, family: Json = QWEN, **request: Any) -> int:
        """Opens a chat request and returns its number."""
        self._numbers += 1
        opened = {"op": "open", "stream": self._numbers, "headers": dict(headers or {}), "family": family}
        await self.socket.send_json({**opened, "request": request})
        return self._numbers

    async def abort(self, number: int) -> None:
        await self.socket.send_json({"op": "abort", "stream": number})

    async def listen(self) -> None:
        """Until the connection is closed."""
        async for message in self.socket:
            async with self._heard:
                self.messages += 1
                self.heard_at.append(asyncio.get_running_loop().time())
                if message.type is aiohttp.WSMsgType.TEXT:
                    refusal = message.json()
                    self.refusals[refusal["stream"]] = refusal
                else:
                    for record in read_message(message.data):
                        self.records.setdefault(record.stream, []).append(record)
                self._heard.notify_all()

    async def over(self, number: int) -> list[Record]:
        """All records of a stream, when it is over."""
        await self.heard(lambda: isinstance(self.records.get(number, [None])[-1], (End, EngineFailed, Lost)))
        return self.records[number]

    async def refusal(self, number: int) -> tuple[int, Json]:
        await self.heard(lambda: number in self.refusals)
        return self.refusals[number]["status"], self.refusals[number]["body"]

    async def tokens(self, number: int, count: int) -> None:
        """Waits until so many records of tokens were heard."""
        await self.heard(lambda: sum(isinstance(item, Tokens) for item in self.records.get(number, ())) >= count)

    async def heard(self, condition: Any) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS), self._heard:
            await self._heard.wait_for(condition)


@asynccontextmanager
async def connected(url: str, *, unix_socket: Path | None = None, **options: Any) -> AsyncIterator[PluginClient]:
    """A client that listens. `options` are those of aiohttp's `ws_connect`."""
    connector = aiohttp.UnixConnector(str(unix_socket)) if unix_socket is not None else None
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.ws_connect(f"{url}/v1/penstock/streams", params={"frames": "1"}, **options) as socket,
    ):
        client = PluginClient(socket)
        listening = asyncio.create_task(client.listen())
        try:
            yield client
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


def ids(records: list[Record], choice: int = 0) -> list[int]:
    """All ids of a choice."""
    return [number for record in of_choice(records, choice) for number in record.ids]


def channels(records: list[Record], choice: int = 0) -> list[tuple[str, list[int]]]:
    """The ids of a choice by channel, neighbours together."""
    tagged = [(record.tag.name.lower(), number) for record in of_choice(records, choice) for number in record.ids]
    return [(tag, [number for _, number in group]) for tag, group in groupby(tagged, key=lambda pair: pair[0])]


def of_choice(records: list[Record], choice: int) -> list[Tokens]:
    return [record for record in records if isinstance(record, Tokens) and record.choice == choice]


def finish(records: list[Record], choice: int = 0) -> Finish:
    [found] = [record for record in records if isinstance(record, Finish) and record.choice == choice]
    return found


def begin(records: list[Record]) -> Begin:
    first = records[0]
    assert isinstance(first, Begin)
    return first
