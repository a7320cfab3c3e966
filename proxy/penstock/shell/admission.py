"""Who may come in: how many streams are open and how many bytes they hold, in all and per key.

A stream enters before its body is read, so that bodies which come slowly count too, and leaves when its answer is
over. What is refused costs nothing but its own answer.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from penstock.core.errors import CallerError, Overloaded
from penstock.settings import Limits
from penstock.shell.auth import ANONYMOUS
from penstock.shell.callers import Caller

# A full replica has room again as soon as any stream ends; whoever retries sooner only adds to the crowd.
RETRY = {"Retry-After": "1"}


class Place:
    """One admitted stream: what it holds counts until it leaves."""

    def __init__(self, admission: "Admission", principal: str) -> None:
        self.principal = principal
        self._admission = admission
        self._request = 0
        self._waiting = 0

    def hold(self, size: int) -> None:
        """`size` more bytes of the request. Raises `Overloaded` where all streams, or this caller's, hold too many."""
        self._admission.check_bytes(self.principal, size)
        self._admission.count_bytes(self.principal, size)
        self._request += size

    def wait(self, size: int) -> None:
        """`size` bytes of the answer wait for a client that lags; they are bounded by themselves, so never refused."""
        self._admission.count_bytes(self.principal, size - self._waiting)
        self._waiting = size

    def leave(self) -> None:
        self._admission.count_bytes(self.principal, -self._request - self._waiting)
        self._request = self._waiting = 0


class Admission:
    """Counts and caps of this replica. Callers without a key are no key: for them the caps on all streams hold."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._streams = 0
        self._bytes = 0
        self._streams_of: dict[str, int] = {}
        self._bytes_of: dict[str, int] = {}

    @contextmanager
    def entered(self, caller: Caller) -> Iterator[Place]:
        """A place for one stream. Raises `Overloaded`: 429 where the caller has enough, 503 where this replica has."""
        self._check_streams(caller)
        name = caller.name
        self._streams += 1
        self._streams_of[name] = self._streams_of.get(name, 0) + 1
        place = Place(self, name)
        try:
            yield place
        finally:
            place.leave()
            self._streams -= 1
            self._streams_of[name] -= 1
            if not self._streams_of[name]:
                del self._streams_of[name]
                self._bytes_of.pop(name, None)

    def check_bytes(self, principal: str, more: int) -> None:
        of_all, of_key = self._limits.held_bytes, self._limits.held_bytes_per_key
        if principal != ANONYMOUS and self._bytes_of.get(principal, 0) + more > of_key:
            message = f"your open streams hold {of_key} bytes, the most that they may (limits.held_bytes_per_key)"
            raise Overloaded("too_many_bytes_of_key", _later(message), status=429, headers=RETRY)
        if self._bytes + more > of_all:
            message = f"the open streams hold {of_all} bytes, the most that this replica takes (limits.held_bytes)"
            raise Overloaded("too_many_bytes", _later(message), headers=RETRY)

    def count_bytes(self, principal: str, more: int) -> None:
        if more:
            self._bytes += more
            self._bytes_of[principal] = self._bytes_of.get(principal, 0) + more

    def _check_streams(self, caller: Caller) -> None:
        most = caller.plan.streams
        if most is None and caller.name != ANONYMOUS:
            most = self._limits.streams_per_key
        if most is not None and self._streams_of.get(caller.name, 0) >= most:
            message = (
                f"you have {most} open streams, the most that you may (limits.streams_per_key, or your key's plan)"
            )
            raise Overloaded("too_many_streams_of_key", _later(message), status=429, headers=RETRY)
        if self._streams >= self._limits.streams:
            message = f"{self._limits.streams} streams are open, the most that this replica takes (limits.streams)"
            raise Overloaded("too_many_streams", _later(message), headers=RETRY)


def _later(message: str) -> str:
    return f"{message}; send the request again when one has ended"


async def read_body(http: web.Request, most: int, seconds: float, place: Place) -> bytes:
    """The whole body, decompressed, counted as it comes: at most `most` bytes within `seconds`.

    Raises `CallerError` (413, 408, 400) and `Overloaded`. aiohttp's own `read` keeps what it has read for as long as
    the request lives, and has no time limit.
    """
    if (http.content_length or 0) > most:
        raise _too_large(most)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for data in http.content.iter_any():
                size += len(data)
                if size > most:
                    raise _too_large(most)
                place.hold(len(data))
                pieces.append(data)
    except TimeoutError:
        message = f"the request body did not come within {seconds:g} s (timing.request_seconds); {size} bytes had"
        raise CallerError("request_timeout", message, status=408, headers={"Connection": "close"}) from None
    except web.RequestPayloadError:
        raise CallerError("invalid_json", "the request body is not what its Content-Encoding says") from None
    return b"".join(pieces)


def _too_large(most: int) -> CallerError:
    message = f"the request body is larger than {most} bytes (limits.request_bytes)"
    return CallerError("request_too_large", message, status=413)
