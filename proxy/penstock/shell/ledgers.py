"""What each caller has used: buckets of requests and tokens, a quota, open streams. In memory, or shared in Redis.

Both ledgers do the same arithmetic, in one step that nothing comes between, and `tests/shell/test_ledgers.py` holds
them against each other. A bucket holds a minute's worth and fills evenly; the quota is an integer that only
`admit` and `settle` change. A request is admitted with a reservation of tokens and settled with what was billed.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast
from urllib.parse import quote

Refusal = Literal["", "streams", "requests", "tokens", "quota"]

# A stream whose replica died counts as open for so long; replicas that live say so three times as often.
LEASE_SECONDS = 60.0
# Callers that this process remembers; of more, those that were not seen for longest are forgotten.
_MOST_CALLERS = 100_000
_CONNECTIONS = 4
# Settled late, a stream must still be found; no stream lives as long.
_SECONDS_KEPT = 86_400


@dataclass(frozen=True, slots=True)
class Entry:
    """One request at the ledger. Limits of 0 are none, but for `quota`, where -1 is none.

    `period` names the quota's period and `period_ends` is when it does, in seconds since the epoch.
    """

    caller: str
    stream_id: str
    reserved: int
    requests: int = 0
    tokens: int = 0
    streams: int = 0
    quota: int = -1
    period: str = ""
    period_ends: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Admitted where `refused` is empty, and then counted already.

    What is left in a bucket, or was used of the quota, says nothing where the entry has no such limit.
    """

    refused: Refusal
    retry_seconds: float
    requests_left: float
    tokens_left: float
    quota_used: int


class Ledger(Protocol):
    async def admit(self, entry: Entry) -> Verdict:
        """Counts the request, once however often it is asked, or refuses it and counts nothing."""

    async def settle(self, entry: Entry, billed: int) -> None:
        """Closes the stream and replaces its reservation by what was billed; does nothing the second time."""

    async def charge(self, entry: Entry, billed: int) -> None:
        """Settles what this ledger admitted, if its answer was lost, and else adds the bill; once."""

    async def renew(self, entries: Sequence[Entry]) -> None:
        """Says that these streams are still open."""

    async def close(self) -> None: ...


# --- In this process ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Account:
    requests: float | None = None  # None: full
    tokens: float | None = None
    at: float = 0.0  # when the buckets were so full
    used: dict[str, int] = field(default_factory=dict)  # of the quota, by period
    open: set[str] = field(default_factory=set)


class MemoryLedger:
    """Gone with the process. `clock` gives seconds."""

    def __init__(self, clock: "Clock") -> None:
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    async def admit(self, entry: Entry) -> Verdict:
        account = self._account(entry.caller)
        requests, tokens = self._levels(account, entry)
        used = account.used.get(entry.period, 0) if entry.quota >= 0 else 0
        needed = min(entry.reserved, entry.tokens)
        if entry.stream_id in account.open:
            return Verdict("", 0.0, requests, tokens, used)
        if entry.streams and len(account.open) >= entry.streams:
            return Verdict("streams", 1.0, requests, tokens, used)
        if entry.requests and requests < 1:
            return Verdict("requests", (1 - requests) * 60 / entry.requests, requests, tokens, used)
        if entry.tokens and tokens < needed:
            return Verdict("tokens", (needed - tokens) * 60 / entry.tokens, requests, tokens, used)
        if entry.quota >= 0 and used + entry.reserved > entry.quota:
            return Verdict("quota", 0.0, requests, tokens, used)
        requests, tokens = requests - 1, tokens - entry.reserved
        self._keep(account, entry, requests, tokens)
        account.open.add(entry.stream_id)
        if entry.quota >= 0:
            used += entry.reserved
            account.used = {entry.period: used}
        return Verdict("", 0.0, requests, tokens, used)

    async def settle(self, entry: Entry, billed: int) -> None:
        self.settle_now(entry, billed)

    def settle_now(self, entry: Entry, billed: int) -> None:
        account = self._account(entry.caller)
        if entry.stream_id not in account.open:
            return
        account.open.remove(entry.stream_id)
        requests, tokens = self._levels(account, entry)
        self._keep(account, entry, requests, min(float(entry.tokens), tokens + entry.reserved - billed))
        if entry.quota >= 0:
            account.used[entry.period] = account.used.get(entry.period, 0) + billed - entry.reserved

    async def charge(self, entry: Entry, billed: int) -> None:
        raise NotImplementedError("this ledger admits everything that it bills")

    async def renew(self, entries: Sequence[Entry]) -> None:
        """Nothing: these streams end with this process."""

    async def close(self) -> None: ...

    def know(self, entry: Entry, used: int) -> None:
        """What the shared ledger said last about this caller's quota."""
        self._account(entry.caller).used = {entry.period: used}

    def _account(self, caller: str) -> _Account:
        account = self._accounts.setdefault(caller, _Account())
        self._accounts.move_to_end(caller)
        while len(self._accounts) > _MOST_CALLERS:
            self._accounts.popitem(last=False)
        return account

    def _levels(self, account: _Account, entry: Entry) -> tuple[float, float]:
        passed = max(0.0, self._clock() - account.at)
        return _filled(account.requests, entry.requests, passed), _filled(account.tokens, entry.tokens, passed)

    def _keep(self, account: _Account, entry: Entry, requests: float, tokens: float) -> None:
        account.requests = requests if entry.requests else None
        account.tokens = tokens if entry.tokens else None
        account.at = max(self._clock(), account.at)


def _filled(level: float | None, a_minute: int, passed: float) -> float:
    return float(a_minute) if level is None else min(float(a_minute), level + passed * a_minute / 60)


class Clock(Protocol):
    def __call__(self) -> float: ...


# --- In Redis -----------------------------------------------------------------------------------------

# One script, so that no other replica comes between reading and counting. The clock is Redis's own unless one is
# given: replicas' clocks differ. KEYS: buckets, quota, open streams. Numbers go back as text: Lua's would be cut.
_SCRIPT = """
local what, now, stream, reserved = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local per_minute, tokens_cap, streams_cap = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local quota, ends, lease, kept, billed = tonumber(ARGV[8]), ARGV[9], tonumber(ARGV[10]), tonumber(ARGV[11]), ARGV[12]
if now < 0 then
  local t = redis.call('TIME')
  now = tonumber(t[1]) + tonumber(t[2]) / 1000000
end
local function keep_quota()
  if quota >= 0 then redis.call('EXPIREAT', KEYS[2], ends + kept) end
end
local bucket = redis.call('HMGET', KEYS[1], 'requests', 'tokens', 'at')
local requests, tokens = tonumber(bucket[1] or per_minute), tonumber(bucket[2] or tokens_cap)
local at = tonumber(bucket[3] or now)
local passed = math.max(0, now - at)
requests = math.min(per_minute, requests + passed * per_minute / 60)
tokens = math.min(tokens_cap, tokens + passed * tokens_cap / 60)
local function keep(name, cap, level)
  if cap > 0 then redis.call('HSET', KEYS[1], name, string.format('%.17g', level))
  else redis.call('HDEL', KEYS[1], name) end
end
local function store()
  keep('requests', per_minute, requests)
  keep('tokens', tokens_cap, tokens)
  redis.call('HSET', KEYS[1], 'at', string.format('%.17g', math.max(now, at)))
  redis.call('EXPIRE', KEYS[1], kept)
end
if what ~= 'admit' then
  if redis.call('ZREM', KEYS[3], stream) == 1 then
    tokens = math.min(tokens_cap, tokens + reserved - billed)
    store()
    if quota >= 0 then redis.call('INCRBY', KEYS[2], billed - reserved) keep_quota() end
  elseif what == 'charge' and quota >= 0 and redis.call('SET', KEYS[3] .. ':' .. stream, 1, 'NX', 'EX', kept) then
    redis.call('INCRBY', KEYS[2], billed)
    keep_quota()
  end
  return {}
end
local used = quota >= 0 and tonumber(redis.call('GET', KEYS[2]) or 0) or 0
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - kept)
local refused, wait = '', 0
local again = redis.call('ZSCORE', KEYS[3], stream)
local needed = math.min(reserved, tokens_cap)
if again then
  refused = ''
elseif streams_cap > 0 and redis.call('ZCOUNT', KEYS[3], string.format('(%.17g', now), '+inf') >= streams_cap then
  refused, wait = 'streams', 1
elseif per_minute > 0 and requests < 1 then
  refused, wait = 'requests', (1 - requests) * 60 / per_minute
elseif tokens_cap > 0 and tokens < needed then
  refused, wait = 'tokens', (needed - tokens) * 60 / tokens_cap
elseif quota >= 0 and used + reserved > quota then
  refused = 'quota'
else
  requests, tokens, used = requests - 1, tokens - reserved, used + reserved
  store()
  if quota >= 0 then redis.call('INCRBY', KEYS[2], reserved) keep_quota() end
  redis.call('ZADD', KEYS[3], now + lease, stream)
  redis.call('EXPIRE', KEYS[3], kept)
end
return {refused, string.format('%.17g', wait), string.format('%.17g', requests), string.format('%.17g', tokens),
  string.format('%d', used)}
"""


class RedisLedger:
    """Shared by every replica that uses the same Redis. Raises what the client raises; every call is one round trip."""

    def __init__(self, client: Any, clock: Clock | None = None, *, prefix: str = "penstock") -> None:
        self._client = client
        self._prefix = prefix
        self._clock = clock  # a test's; Redis's own otherwise
        self._script = client.register_script(_SCRIPT)

    async def admit(self, entry: Entry) -> Verdict:
        answer = cast(list[bytes], await self._run("admit", entry, 0))
        refused, wait, requests, tokens, used = (part.decode() for part in answer)
        return Verdict(cast(Refusal, refused), float(wait), float(requests), float(tokens), int(used))

    async def settle(self, entry: Entry, billed: int) -> None:
        await self._run("settle", entry, billed)

    async def charge(self, entry: Entry, billed: int) -> None:
        await self._run("charge", entry, billed)

    async def renew(self, entries: Sequence[Entry]) -> None:
        seconds, microseconds = await self._client.time()
        until = seconds + microseconds / 1e6 + LEASE_SECONDS
        async with self._client.pipeline(transaction=False) as pipeline:
            for entry in entries:
                pipeline.zadd(self._keys(entry)[2], {entry.stream_id: until}, xx=True)
            await pipeline.execute()

    async def close(self) -> None:
        await self._client.aclose()

    async def _run(self, what: str, entry: Entry, billed: int) -> Any:
        now = -1.0 if self._clock is None else self._clock()
        arguments = [what, now, entry.stream_id, entry.reserved, entry.requests, entry.tokens, entry.streams]
        arguments += [entry.quota, entry.period_ends, LEASE_SECONDS, _SECONDS_KEPT, billed]
        answer: Awaitable[Any] = self._script(keys=self._keys(entry), args=arguments)
        return await answer

    def _keys(self, entry: Entry) -> list[str]:
        """The braces put all keys of a caller into one slot of a cluster; a name cannot hold any, being quoted."""
        at = f"{self._prefix}:{{{quote(entry.caller, safe='')}}}"
        return [f"{at}:buckets", f"{at}:quota:{entry.period}", f"{at}:open"]


def connected(url: str, seconds: float) -> Any:
    """A client of redis-py that waits no longer than `seconds` for an answer, and asks twice if a connection broke.

    It has few connections and its callers queue for them: a connection for each of sixty requests at once took
    longer than their time-out, and a Redis that was well was taken for gone. Raises `ImportError` where the extra
    `redis` is not installed, `ValueError` for a URL that is none.
    """
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError as Broken

    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_CONNECTIONS,
        timeout=seconds,
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        retry=Retry(NoBackoff(), 1, supported_errors=(Broken,)),
    )
    return Redis.from_pool(pool)
