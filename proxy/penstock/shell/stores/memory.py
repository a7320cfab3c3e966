"""Logs in this process: gone with it, and found only by it."""

import asyncio

from penstock.shell.stores.log import Claim, NoteFate, OnLost, OnNote, OnWord, StreamInfo, StreamLog


class MemoryStore:
    """Keeps at most `most_bytes` of logs, finished ones for `retention_seconds`.

    Past the bound the logs that finished first go first; where all are still running, the oldest of them loses its
    start, and a cursor in that part is answered 410.
    """

    def __init__(self, most_bytes: int, retention_seconds: float) -> None:
        self._most_bytes = most_bytes
        self._retention_seconds = retention_seconds
        self.size = 0
        self._running: dict[str, StreamLog] = {}
        self._finished: dict[str, tuple[float, StreamLog]] = {}  # in the order in which they ended
        self._claims: dict[tuple[str, str], Claim] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self._loop = asyncio.get_running_loop()
        self._sweep: asyncio.TimerHandle | None = None

    async def create(self, info: StreamInfo, claim: Claim | None) -> StreamLog | Claim:
        if claim is not None and (held := self.claim(claim)) is not None:
            return held
        log = StreamLog(info, self)
        self._running[info.stream_id] = log
        return log

    def held(self, claim: Claim) -> Claim | None:
        """Who has the key."""
        return self._claims.get((claim.principal, claim.key))

    def claim(self, claim: Claim) -> Claim | None:
        """Takes the key, or tells who had it before."""
        if (held := self.held(claim)) is not None:
            return held
        place = (claim.principal, claim.key)
        self._claims[place] = claim
        self._keys[claim.stream_id] = place
        return None

    def ids(self) -> set[str]:
        """The streams whose logs are kept."""
        return self._running.keys() | self._finished.keys()

    def adopt(self, log: StreamLog) -> None:
        """Keeps a running log that was made elsewhere."""
        self._running[log.info.stream_id] = log

    def drop(self, stream_id: str) -> None:
        """Forgets a log whatever its state."""
        if (log := self._running.pop(stream_id, None)) is not None:
            self.size -= log.size
            self._free_key(stream_id)
        elif stream_id in self._finished:
            self._forget(stream_id)

    def start(self, on_word: OnWord, on_note: OnNote, on_lost: OnLost) -> None:
        """There are no other replicas."""

    async def tell(self, stream_id: str, principal: str, word: str) -> None:
        """There are no other replicas."""

    async def annotate(self, stream_id: str, principal: str, note: bytes) -> NoteFate:  # noqa: ARG002
        """There are no other replicas."""
        return "no_such_stream"

    async def find(self, stream_id: str) -> StreamLog | None:
        if (log := self._running.get(stream_id)) is not None:
            return log
        _, log = self._finished.get(stream_id, (0.0, None))
        return log

    async def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()

    def ended(self, log: StreamLog) -> None:
        """Its log is kept for the retention time, or dropped at once where it answers nothing."""
        stream_id = log.info.stream_id
        if self._running.pop(stream_id, None) is None:
            return  # dropped before
        self._finished[stream_id] = (self._loop.time() + self._retention_seconds, log)
        if not log.answers:
            self._forget(stream_id)
        elif self._sweep is None:
            self._sweep = self._loop.call_later(self._retention_seconds, self._expire)

    def grew(self, size: int) -> None:
        self.size += size
        while self.size > self._most_bytes and self._finished:
            self._forget(next(iter(self._finished)))
        if self.size > self._most_bytes:
            for running in self._running.values():
                self.size -= running.forget_oldest(self.size - self._most_bytes)
                if self.size <= self._most_bytes:
                    return

    def _expire(self) -> None:
        self._sweep = None
        now = self._loop.time()
        while self._finished:
            stream_id, (deadline, _) = next(iter(self._finished.items()))
            if deadline > now:
                self._sweep = self._loop.call_at(deadline, self._expire)
                return
            self._forget(stream_id)

    def _forget(self, stream_id: str) -> None:
        _, log = self._finished.pop(stream_id)
        self.size -= log.size
        self._free_key(stream_id)

    def _free_key(self, stream_id: str) -> None:
        if (place := self._keys.pop(stream_id, None)) is not None:
            self._claims.pop(place, None)
