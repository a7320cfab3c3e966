"""Which engine answers: the vLLM servers of this deployment, what is known of each, and the choice among them.

The choice (`choose`, `Circuit`, `Checks`) is pure: the time comes in as a number and nothing is awaited. `Cluster`
does the awaiting: it looks addresses up, asks each engine how it is, and keeps what it hears.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Final
from urllib.parse import urlsplit

import orjson

from penstock.core.detokenize import Vocabulary
from penstock.core.errors import CallerError, EngineError, Problem
from penstock.core.prompt import least_tokens, prefix_key
from penstock.core.request import StreamRequest
from penstock.settings import Routing, Settings, Upstream
from penstock.shell.engine import Engine, look_up

_log = logging.getLogger("penstock")

Resolve = Callable[[str], Awaitable[list[str]]]
"""A name's addresses. Raises `OSError` where there is no answer."""

# An engine that hangs must not keep the others' models from being listed.
_LIST_SECONDS = 5.0
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
    models: Mapping[str, int | None] | None = None
    """What it serves, with the context windows; None while it has not said."""
    models_asked: float = -math.inf
    is_leaving: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    work: asyncio.Task[None] | None = None

    def serves(self, model: str) -> bool:
        return self.models is None or model in self.models

    def option(self, zone: str) -> Option:
        near = not zone or self.upstream.zone == zone
        return Option(self.key, self.in_flight + self.others, self.upstream.weight, near, has_queue=self.waiting > 0)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks of the choice: `affinity` is hashed, `zone` is the caller's."""

    model: str
    affinity: bytes | None = None
    zone: str = ""


# How an engine answers at once that it is full.
FULL: Final = (429, 503)


def cost_nothing(problem: Problem) -> bool:
    """Whether the engine did no work on the request: it was not reached, or it was full."""
    return problem.code == "engine_unreachable" or problem.status in FULL


def no_engine() -> EngineError:
    """For a request that comes while there is no engine at all."""
    message = "no engine is known at the moment; send the request again in a moment"
    return EngineError("no_engine", message, status=503, headers={"Retry-After": "1"})


class Cluster:
    """The engines. Enter it inside a running loop; leaving it closes every connection."""

    def __init__(self, settings: Settings, resolve: Resolve = look_up) -> None:
        self._settings = settings
        self._routing: Routing = settings.routing
        self._resolve = resolve
        self._now = asyncio.get_running_loop().time
        self._members: dict[str, Member] = {}
        self._leaving: set[Member] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._lookups: list[asyncio.Task[None]] = []
        self._first_lookups: list[asyncio.Event] = []
        for upstream in settings.upstreams:
            if upstream.discover == "dns":
                self._first_lookups.append(asyncio.Event())
                self._lookups.append(asyncio.create_task(self._discover(upstream, self._first_lookups[-1])))
            else:
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
        # Where nobody is known to serve the model, the engine's own refusal is the answer.
        left = [member for member in left if member.serves(wish.model)] or left
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

    async def list_models(self, authorization: Callable[[Engine], Mapping[str, str]]) -> tuple[int, str, bytes]:
        """Status, type and body of `/v1/models`: an only engine's own, or what all engines list, each model once."""
        members = [member for member in self.members if member.checks.is_healthy] or self.members
        if not members:
            raise no_engine()
        asked = [member.engine.get("v1/models", authorization(member.engine), _LIST_SECONDS) for member in members]
        told = await asyncio.gather(*asked, return_exceptions=True)
        answers = [answer for answer in told if not isinstance(answer, BaseException)]
        if not answers:
            raise next(error for error in told if isinstance(error, BaseException))
        lists = [answer for answer in answers if answer[0] == 200]
        return (lists or answers)[0] if len(lists) < 2 else (200, "application/json", _merged(lists))

    def window(self, model: str) -> int | None:
        """The largest context window of this model in tokens; None unless every engine has said what it serves."""
        windows: list[int | None] = []
        for member in self.members:
            if member.models is None:
                return None
            windows += [member.models[model]] if model in member.models else []
        known = [window for window in windows if window is not None]
        return max(known) if known and len(known) == len(windows) else None

    def vocabulary(self, model: str) -> Vocabulary | None:
        """The model's tokenizer, where an engine's plugin has told it."""
        for member in self.members:
            plugin = member.engine.plugin
            if plugin is not None and plugin.vocabulary is not None and plugin.serves(model):
                return plugin.vocabulary
        return None

    def wish(self, headers: Mapping[str, str], request: StreamRequest) -> Wish:
        """What a request asks of the choice, by the settings, its headers and its prompt."""
        routing = self._routing
        zone = headers.get(routing.zone_header, "") if routing.zone_header else ""
        affinity = None
        if routing.affinity == "session" and (session := headers.get(routing.session_header)):
            affinity = session.encode("utf-8", "surrogateescape")
        elif routing.affinity == "prefix" and len(self._members) > 1:
            affinity = prefix_key(request.engine_body, routing.prefix_bytes)
        return Wish(request.model, affinity, zone)

    async def refuse_too_long(self, request: StreamRequest) -> None:
        """Raises `CallerError` for a prompt that certainly fits no engine's context window, so that none sees it."""
        window = self.window(request.model) if self._routing.refuse_long_prompts else None
        # No token is less than a byte, so nearly every prompt needs no counting.
        if window is None or len(request.engine_body) <= window:
            return
        vocabulary = self.vocabulary(request.model)
        count = None if vocabulary is None else vocabulary.count
        least = await asyncio.to_thread(least_tokens, request.engine_body, count)
        if least >= window:
            message = (
                f"the prompt has at least {least} tokens and the context window of {request.model} is {window} with "
                "the answer; shorten the messages"
            )
            raise CallerError("context_length_exceeded", message, param="messages")

    async def looked_up(self) -> None:
        """Until every name was looked up once, so that the first request finds engines; but not long."""
        waits = [asyncio.create_task(first.wait()) for first in self._first_lookups]
        if waits:
            _, waiting = await asyncio.wait(waits, timeout=self._settings.timing.connect_seconds)
            for wait in waiting:
                wait.cancel()

    async def settled(self) -> None:
        """Until each engine's plugin was found, or seen to be missing, for the first time."""
        for member in self.members:
            if member.engine.plugin is not None:
                await member.engine.plugin.settled()

    async def close(self) -> None:
        for lookup in self._lookups:
            lookup.cancel()
        await asyncio.gather(*self._lookups, return_exceptions=True)
        for member in (*self._members.values(), *self._leaving):
            self._close_soon(member)
        while self._closing:
            await asyncio.wait(self._closing)

    # -- who belongs to it -------------------------------------------------------------------------

    async def _discover(self, upstream: Upstream, first: asyncio.Event) -> None:
        """Every address of a name is an engine. A lookup that fails changes nothing: engines outlive their DNS."""
        host = urlsplit(upstream.url).hostname or ""
        told = ""
        while True:
            try:
                found = {f"{upstream.place} at {address}": address for address in await self._resolve(host)}
            except OSError as error:
                if told != str(error):
                    _log.warning("engine %s: %s cannot be looked up: %s", upstream.label, host, error)
                told = str(error)
            else:
                told = ""
                self._change(upstream, found)
            first.set()
            await asyncio.sleep(self._routing.dns_seconds)

    def _change(self, upstream: Upstream, found: Mapping[str, str]) -> None:
        """Those that came join, those that went leave."""
        known = {key: member for key, member in self._members.items() if member.upstream is upstream}
        for key in found.keys() - known.keys():
            _log.info("engine %s came", key)
            self._join(upstream, key, found[key])
        for key in known.keys() - found.keys():
            _log.info("engine %s went", key)
            self._leave(known[key])

    def _join(self, upstream: Upstream, key: str, address: str | None = None) -> None:
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

        engine = Engine(upstream, self._settings.timing, note, address)
        member = Member(key, engine, upstream, checks, circuit)
        member.work = asyncio.create_task(self._watch(member))
        self._members[key] = member

    def _leave(self, member: Member) -> None:
        """No new requests; its streams go on, and its connections are closed after the last of them."""
        self._members.pop(member.key, None)
        member.is_leaving = True
        self._leaving.add(member)
        if member.in_flight == 0:
            self._close_soon(member)

    def _close_soon(self, member: Member) -> None:
        self._leaving.discard(member)
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
            if member.checks.is_sure:
                await self._ask(member)
            try:
                # Where there is doubt it is asked more often, so that it is gone, or back, soon.
                async with asyncio.timeout(seconds if member.checks.is_sure else min(seconds, _DOUBT_SECONDS)):
                    await member.wake.wait()
                await asyncio.sleep(min(seconds, _BREATH_SECONDS))
            except TimeoutError:
                pass

    async def _ask(self, member: Member) -> None:
        """What a healthy engine serves, and how busy it is with the requests of others."""
        if self._now() - member.models_asked >= self._routing.models_seconds:
            models = await member.engine.models()
            if models is not None:
                member.models, member.models_asked = models, self._now()
        load = await member.engine.load() if self._routing.read_load else None
        if load is not None:
            running, member.waiting = load
            member.others = max(0, running + member.waiting - member.in_flight)


def _merged(lists: list[tuple[int, str, bytes]]) -> bytes:
    cards: dict[str, object] = {}
    for _, _, body in lists:
        try:
            for card in orjson.loads(body)["data"]:
                cards.setdefault(str(card["id"]), card)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            continue
    return orjson.dumps({"object": "list", "data": list(cards.values())})


async def _close(member: Member) -> None:
    if member.work is not None:
        member.work.cancel()
        await asyncio.wait({member.work})
    await member.engine.close()
