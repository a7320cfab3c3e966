"""One WebSocket of a sidecar: opens and aborts come in, frames go out. Ends all of its streams when it ends."""

import asyncio
import json
import logging
from collections.abc import Mapping, MutableMapping
from contextlib import aclosing
from typing import Any, Protocol

from penstock_vllm.channels import FamilyError, Table, Tables
from penstock_vllm.chat import NEEDS_TEXT_CODE, Chat, ChatDoor, Refusal, final_reasons
from penstock_vllm.frames import LARGEST_STREAM
from penstock_vllm.outbox import Outbox
from penstock_vllm.streams import OpenStreams, Stream, refused
from penstock_vllm.tap import cause_of

_log = logging.getLogger("vllm.penstock")

_POLICY_VIOLATION = 1008


class Socket(Protocol):
    """A WebSocket as ASGI has it."""

    async def receive(self) -> MutableMapping[str, Any]: ...
    async def send_text(self, data: str) -> None: ...
    async def send_bytes(self, data: bytes) -> None: ...
    async def close(self, code: int = 1000, reason: str | None = None) -> None: ...


class ContractError(Exception):
    """A message that the contract does not know; the connection is closed with the text as its reason."""


class Connection:
    """An accepted WebSocket. `run` returns when it is over."""

    def __init__(self, socket: Socket, door: ChatDoor, streams: OpenStreams, tables: Tables, most_bytes: int) -> None:
        self._socket = socket
        self._door = door
        self._open_streams = streams
        self._tables = tables
        self._outbox = Outbox(most_bytes, self._lose)
        self._streams: dict[int, Stream] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._has_lost = False
        self._greeting: str | None = None

    def greet(self, instance: str) -> None:
        """The first message says which process answers. Before `run`."""
        self._greeting = json.dumps({"op": "hello", "instance": instance})

    async def run(self) -> None:
        sender = asyncio.create_task(self._send())
        receiver = asyncio.create_task(self._receive())
        try:
            await asyncio.wait((sender, receiver), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._end(sender, receiver)

    async def _end(self, *own: asyncio.Task[None]) -> None:
        """Aborts what is still open, in the engine too, before anything else is let go."""
        tasks = [*own, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                _log.debug("penstock: a connection ended: %r", outcome)

    async def _send(self) -> None:
        if self._greeting is not None:
            await self._socket.send_text(self._greeting)
        while True:
            message = await self._outbox.next()
            if isinstance(message, str):
                await self._socket.send_text(message)
            else:
                await self._socket.send_bytes(message)

    async def _receive(self) -> None:
        while (message := await self._socket.receive())["type"] == "websocket.receive":
            try:
                self._obey(message.get("text"))
            except ContractError as error:
                _log.warning("penstock: a sidecar's connection is closed: %s", error)
                await self._socket.close(_POLICY_VIOLATION, str(error))
                return

    def _obey(self, text: str | None) -> None:
        operation = _operation(text)
        number = operation["stream"]
        if operation["op"] == "abort":
            self._abort(number)
            return
        if number in self._tasks:
            raise ContractError(f"stream {number} is open already")
        task = self._tasks[number] = asyncio.create_task(self._generate(number, operation))
        task.add_done_callback(lambda _: self._forget(number))

    def _abort(self, number: int) -> None:
        if stream := self._streams.get(number):
            stream.abort()
        elif task := self._tasks.get(number):
            task.cancel()

    def _forget(self, number: int) -> None:
        self._tasks.pop(number, None)
        self._streams.pop(number, None)

    def _lose(self, numbers: list[int]) -> None:
        if not self._has_lost:
            self._has_lost = True
            _log.warning("penstock: a sidecar does not read what it asked for, and loses streams")
        self._open_streams.lost += len(numbers)
        for number in numbers:
            self._abort(number)

    async def _generate(self, number: int, operation: Mapping[str, Any]) -> None:
        try:
            with self._door.counted():
                table = self._tables.table(operation["family"])
                chat = await self._door.open(operation["request"], operation["headers"])
                await self._follow(self._opened(number, table, chat), chat)
        except Refusal as refusal:
            self._refuse(number, refusal.status, refusal.body)
        except FamilyError as error:
            self._refuse(number, 422, _error_body(422, NEEDS_TEXT_CODE, str(error), "family"))
        except Exception:
            _log.exception("penstock: stream %d failed outside the engine", number)
            message = "Penstock's plugin failed; the engine's log says why"
            self._refuse(number, 500, _error_body(500, "InternalServerError", message, None))

    def _refuse(self, number: int, status: int, body: Mapping[str, Any]) -> None:
        if stream := self._streams.get(number):
            stream.fail(status, body)
            self._outbox.commit()
        else:
            self._outbox.put_text(number, refused(number, status, body))

    def _opened(self, number: int, table: Table, chat: Chat) -> Stream:
        task = asyncio.current_task()

        def stop_engine() -> None:
            # Closing vLLM's generator is what aborts the request; the task does that as it is cancelled.
            if task is not None and task is not asyncio.current_task():
                task.cancel()

        stream = self._streams[number] = Stream(
            number,
            self._outbox,
            table,
            stop_engine,
            choices=chat.choices,
            own_stop_ids=chat.own_stop_ids,
            shows_stop_tokens=chat.shows_stop_tokens,
            skips_special=chat.skips_special,
            shows_prompt=chat.shows_prompt,
        )
        return stream

    async def _follow(self, stream: Stream, chat: Chat) -> None:
        """Until the engine has let go of the request. Its tokens take the tap; here only its last word is heard."""
        self._open_streams.add(chat.request_id, stream)
        final = None
        try:
            async with aclosing(chat.results) as results:
                async for result in results:
                    final = result
        except Exception as error:
            raise await self._door.refusal(error) from error
        finally:
            self._open_streams.remove(chat.request_id)
        if final is not None:
            stream.conclude({index: (cause_of(reason, None), reason) for index, reason in final_reasons(final).items()})
            self._outbox.commit()


def _operation(text: str | None) -> dict[str, Any]:
    """A message as the contract has it, or `ContractError`."""
    try:
        operation = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        operation = None
    if not isinstance(operation, dict) or operation.get("op") not in ("open", "abort"):
        raise ContractError("a message is JSON text with an op of open or abort")
    number = operation.get("stream")
    if type(number) is not int or not 1 <= number <= LARGEST_STREAM:
        raise ContractError(f"stream is a number from 1 to {LARGEST_STREAM}")
    if operation["op"] == "open":
        operation.setdefault("headers", {})
        if not all(isinstance(operation.get(name), dict) for name in ("request", "headers", "family")):
            raise ContractError("an open has a request, headers and a family, each an object")
        if not all(isinstance(value, str) and value.isascii() for value in operation["headers"].values()):
            raise ContractError("headers are texts in ASCII")
    return operation


def _error_body(status: int, kind: str, message: str, param: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
