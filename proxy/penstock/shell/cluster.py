"""Which engine answers: the vLLM servers of this deployment, what is known of each, and the choice among them.

The choice (`choose`, `Circuit`, `Checks`) is pure: the time comes in as a number and nothing is awaited. `Cluster`
does the awaiting: it looks addresses up, asks each engine how it is, and keeps what it hears.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b

from penstock.core.errors import EngineError
from penstock.settings import Routing, Settings, Upstream
from penstock.shell.engine import Engine

_log = logging.getLogger("penstock")

# How soon an engine in doubt is asked again, and the least time between two questions.
_DOUBT_SECONDS = 1.0
_BREATH_SECONDS = 0.2


# --- The choice ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """What the choice knows of one engine: its place in the ranking, its streams in flight, and how many it is for."""

    key: str
    streams: int
    weight: float = 1.0
    is_near: bool = True
    has_queue: bool = False

    @property
    def load(self) -> float:
        return self.streams / self.weight


def choose(options: Sequence[Option], wish: bytes | None, *, bound: float = 1.25, free: int = 8) -> Option | None:
    """The engine for a request, of those that may be asked; None if there is none.

    Those in the own zone come first, unless each of them has requests waiting. Without a `wish` the least loaded is
    taken. With one, the engines are ranked by it (rendezvous hashing, so an engine that comes or goes moves only its
    own share), and the first that is not overloaded is taken: one with fewer than `free` streams, or with less than
    `bound` times its share of all of them (consistent hashing with bounded loads, arXiv:1608.01350). `free` and the
    share are for each unit of weight.
    """
    near = [option for option in options if option.is_near]
    if near and not all(option.has_queue for option in near):
        options = near
    if not options:
        return None
    if wish is None:
        # Equal loads are decided by chance, or all replicas of Penstock would pile onto the same engine.
        wish, most = secrets.token_bytes(8), -math.inf
    else:
        share = (sum(option.streams for option in options) + 1) / sum(option.weight for option in options)
        most = max(free, math.ceil(bound * share)) - 1
    return min(options, key=lambda option: (max(option.load, most), _rank(option.key, wish)))


def _rank(key: str, wish: bytes) -> bytes:
    """Where an engine stands for this wish: the smaller, the better."""
    return blake2b(key.encode() + b"\0" + wish, digest_size=8).digest()


# --- What is known of an engine ---------------------------------------------------------------------------


class _State(Enum):
    CLOSED = 1  # requests pass
    OPEN = 2  # none until the pause is over
    TRIAL = 3  # one, whose outcome decides


class Circuit:
    """Passive health: an engine that fails `limit` requests in a row gets none for `pause` seconds, then one.

    Each time in a row the pause doubles, up to `longest`, and it is short again only once the engine has worked for
    as long as it last paused: so one that keeps coming and going is asked less and less.
    """

    def __init__(self, limit: int, pause: float, longest: float) -> None:
        self._limit = limit
        self._first_pause = pause
        self._longest = longest
        self._state = _State.CLOSED
        self._failures = 0
        self._pause = 0.0
        self._until = -math.inf
        self._works_since = -math.inf

    @property
    def is_closed(self) -> bool:
        return self._state is _State.CLOSED

    def admits(self, now: float) -> bool:
        return self._state is _State.CLOSED or (self._state is _State.OPEN and now >= self._until)

    def begin(self) -> None:
        """A request goes to the engine."""
        if self._state is _State.OPEN:
            self._state = _State.TRIAL

    def leave(self) -> None:
        """A request is over that told nothing, since its client left before the engine said anything."""
        if self._state is _State.TRIAL:
            self._state = _State.OPEN

    def worked(self, now: float) -> None:
        self._failures = 0
        if self._state is not _State.CLOSED:
            self._state, self._works_since = _State.CLOSED, now

    def failed(self, now: float) -> None:
        self._failures += 1
        if self._state is _State.OPEN or (self._state is _State.CLOSED and self._failures < self._limit):
            return
        forgiven = self._state is _State.CLOSED and now - self._works_since >= self._pause
        self._pause = self._first_pause if forgiven else min(2 * self._pause, self._longest)
        self._state, self._failures, self._until = _State.OPEN, 0, now + self._pause


class Checks:
    """Active health: it takes several answers in a row to change the mind. Until the first, an engine is trusted."""

    def __init__(self, unhealthy_after: int, healthy_after: int) -> None:
        self._needed = {True: unhealthy_after, False: healthy_after}
        self._against = 0
        self.is_healthy = True

    @property
    def is_sure(self) -> bool:
        """Healthy, and nothing speaks against it."""
        return self.is_healthy and self._against == 0

    def told(self, passed: bool) -> bool:
        """Whether the mind changed."""
        self._against = self._against + 1 if passed != self.is_healthy else 0
        if self._against < self._needed[self.is_healthy]:
            return False
        self.is_healthy, self._against = passed, 0
        return True


@dataclass(eq=False, slots=True)
class Member:
    """One engine of the cluster and everything known of it. `key` places it in the ranking: its address."""

    key: str
    engine: Engine
    upstream: Upstream
    checks: Checks
    circuit: Circuit
    in_flight: int = 0
    others: int = 0
    """Streams of other clients, as the engine last told."""
    waiting: int = 0
    is_leaving: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    work: asyncio.Task[None] | None = None

    def option(self, zone: str) -> Option:
        near = not zone or self.upstream.zone == zone
        return Option(self.key, self.in_flight + self.others, self.upstream.weight, near, has_queue=self.waiting > 0)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks of the choice: `affinity` is hashed, `zone` is the caller's."""

    model: str
    affinity: bytes | None = None
    zone: str = ""


def no_engine() -> EngineError:
    """For a request that comes while there is no engine at all."""
    message = "no engine is known at the moment; send the request again in a moment"
    return EngineError("no_engine", message, status=503, headers={"Retry-After": "1"})


class Cluster:
    """The engines. Enter it inside a running loop; leaving it closes every connection."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._routing: Routing = settings.routing
        self._now = asyncio.get_running_loop().time
        self._members: dict[str, Member] = {}
        self._closing: set[asyncio.Task[None]] = set()
        for upstream in settings.upstreams:
            self._join(upstream, upstream.place)

    @property
    def members(self) -> list[Member]:
        """Those that get requests."""
        return list(self._members.values())

    async def is_ready(self) -> bool:
        """Whether an engine is healthy by its own word of this second: the start of a pod must not be too hopeful."""
        members = [member for member in self.members if member.checks.is_healthy]
        return any(await asyncio.gather(*(member.engine.is_healthy() for member in members)))

    def choose(self, wish: Wish, tried: AbstractSet[Member] = frozenset()) -> Member | None:
        """The engine for a request, not one of those `tried`; None if none is left.

        Health decides who is asked first, never that nobody is: where all circuits are open, or no engine passes its
        checks (some upstreams have no /health), the rest is asked all the same, and its own failure is the answer.
        """
        now = self._now()
        left = [member for member in self._members.values() if member not in tried]
        healthy = [member for member in left if member.checks.is_healthy]
        admitted = [member for member in healthy if member.circuit.admits(now)] or healthy or left
        routing = self._routing
        options = [member.option(wish.zone or routing.zone) for member in admitted]
        chosen = choose(options, wish.affinity, bound=routing.load_bound, free=routing.free_streams)
        return None if chosen is None else self._members[chosen.key]

    @contextmanager
    def serving(self, member: Member) -> Iterator[None]:
        """Counts a request of this engine while it lasts."""
        member.in_flight += 1
        member.circuit.begin()
        try:
            yield
        finally:
            member.in_flight -= 1
            member.circuit.leave()
            if member.is_leaving and member.in_flight == 0:
                self._close_soon(member)

    async def settled(self) -> None:
        """Until each engine's plugin was found, or seen to be missing, for the first time."""
        for member in self.members:
            if member.engine.plugin is not None:
                await member.engine.plugin.settled()

    async def close(self) -> None:
        for member in self.members:
            self._close_soon(member)
        while self._closing:
            await asyncio.wait(self._closing)

    # -- who belongs to it -------------------------------------------------------------------------

    def _join(self, upstream: Upstream, key: str) -> None:
        routing = self._routing
        circuit = Circuit(routing.circuit_failures, routing.circuit_seconds, routing.circuit_longest_seconds)
        checks = Checks(routing.unhealthy_after, routing.healthy_after)

        def note(works: bool) -> None:
            was_closed = circuit.is_closed
            (circuit.worked if works else circuit.failed)(self._now())
            if not works:
                member.wake.set()
            if circuit.is_closed != was_closed:
                _log.warning("engine %s: %s", engine.label, "works again" if works else "fails, its circuit is open")

        engine = Engine(upstream, self._settings.timing, note)
        member = Member(key, engine, upstream, checks, circuit)
        member.work = asyncio.create_task(self._watch(member))
        self._members[key] = member

    def _leave(self, member: Member) -> None:
        """No new requests; its streams go on, and its connections are closed after the last of them."""
        self._members.pop(member.key, None)
        member.is_leaving = True
        if member.in_flight == 0:
            self._close_soon(member)

    def _close_soon(self, member: Member) -> None:
        task = asyncio.create_task(_close(member))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # -- how they are ------------------------------------------------------------------------------

    async def _watch(self, member: Member) -> None:
        """Asks an engine how it is, again and again, and at once where a request to it failed."""
        seconds = self._routing.health_seconds
        while True:
            member.wake.clear()
            if member.checks.told(await member.engine.is_healthy(at_most=0.0)):
                healthy = member.checks.is_healthy
                _log.warning("engine %s: %s", member.engine.label, "healthy again" if healthy else "not healthy")
            try:
                # Where there is doubt it is asked more often, so that it is gone, or back, soon.
                async with asyncio.timeout(seconds if member.checks.is_sure else min(seconds, _DOUBT_SECONDS)):
                    await member.wake.wait()
                await asyncio.sleep(min(seconds, _BREATH_SECONDS))
            except TimeoutError:
                pass


async def _close(member: Member) -> None:
    if member.work is not None:
        member.work.cancel()
        await asyncio.wait({member.work})
    await member.engine.close()
