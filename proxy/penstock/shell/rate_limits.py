"""What a caller may use: requests and tokens a minute, open streams, a quota of billed tokens; told as OpenAI tells it.

One ledger counts: in memory, or in Redis for all replicas. Where Redis does not answer, the setting
`limits.without_store` says whether this replica goes on with a count of its own or refuses.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from penstock.access_settings import Plan
from penstock.core.errors import CallerError, Overloaded, Problem
from penstock.shell.callers import Caller
from penstock.shell.ledgers import LEASE_SECONDS, Entry, Ledger, MemoryLedger, Verdict

_log = logging.getLogger("penstock")

# A ledger that did not answer is left alone for so long, so that its callers do not each wait for it.
_PAUSE_SECONDS = 1.0
# No request uses more; a `max_tokens` of 300 digits would take the ledgers' arithmetic beyond what a float can hold.
_MOST_RESERVED = 10**9
# Settlements that wait for the shared ledger; past it the oldest is given up and its reservation stays charged.
_MOST_WAITING = 10_000


@dataclass(slots=True)
class Grant:
    """One admitted request. `settle` it once its bill is known, or with 0 where there was no stream."""

    headers: dict[str, str]
    entry: Entry | None = None  # None: this caller has no limits
    is_local: bool = False  # the shared ledger does not know of it
    is_settled: bool = False


class RateLimits:
    """Over one ledger; `shared` is the one of all replicas, if there is any."""

    def __init__(
        self,
        shared: Ledger | None,
        without_store: Literal["local", "refuse"],
        *,
        reserve_tokens: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._shared = shared
        self._local = MemoryLedger(now)
        self._without_store = without_store
        self._reserve_tokens = reserve_tokens
        self._now = now
        self._paused_until = 0.0
        self._open: dict[str, Grant] = {}
        self._waiting: deque[tuple[Grant, int]] = deque()
        self._has_work = asyncio.Event()
        self._is_closing = False

    async def admit(self, caller: Caller, stream_id: str, prompt_tokens: int, answer_tokens: int | None) -> Grant:
        """Counts a request of about so many tokens. Raises `Problem`: 429 with what is left, or 503."""
        plan = caller.plan
        if plan.requests_per_minute is plan.tokens_per_minute is plan.streams is plan.quota_tokens is None:
            return Grant({})
        expected = self._reserve_tokens if answer_tokens is None else answer_tokens
        entry = _entry(caller, stream_id, prompt_tokens + expected, datetime.fromtimestamp(self._now(), UTC))
        verdict, is_local = await self._ask(entry)
        headers = _headers(plan, verdict)
        if verdict.refused:
            raise _refused(entry, plan, verdict, headers, self._now())
        grant = Grant(headers, entry, is_local)
        self._open[stream_id] = grant
        return grant

    def settle(self, grant: Grant, billed: int) -> None:
        """Replaces the reservation by what was billed, soon; the second time it does nothing."""
        if grant.entry is None or grant.is_settled:
            return
        grant.is_settled = True
        self._open.pop(grant.entry.stream_id, None)
        if grant.is_local:
            self._local.settle_now(grant.entry, billed)
        if self._shared is None:
            return
        if len(self._waiting) >= _MOST_WAITING:
            lost, tokens = self._waiting.popleft()
            _log.error("the bill of %d tokens of %s could not be settled in time", tokens, lost.entry)
        self._waiting.append((grant, billed))
        self._has_work.set()

    async def keep_up(self) -> None:
        """Settles, and tells the shared ledger which streams are still open; returns once `close` was called.

        It is not cancelled: redis-py 8.1 swallows a cancellation that comes while it reads an answer.
        """
        renew_at = self._now() + LEASE_SECONDS / 3
        while not self._is_closing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, renew_at - self._now())):
                    await self._has_work.wait()
            await self._settle_waiting()
            if self._now() >= renew_at:
                renew_at = self._now() + LEASE_SECONDS / 3
                await self._renew()

    def close(self) -> None:
        """Ends `keep_up`, after one last try to settle what waits."""
        self._is_closing = True
        self._has_work.set()

    # -- the ledgers -------------------------------------------------------------------------------

    async def _ask(self, entry: Entry) -> tuple[Verdict, bool]:
        if self._shared is None:
            return await self._local.admit(entry), True
        if self._now() >= self._paused_until:
            try:
                verdict = await self._shared.admit(entry)
            except asyncio.CancelledError:
                self._forget(entry)
                raise
            except Exception as error:  # whatever a client of a store that is gone may raise
                self._pause(error)
                if self._without_store == "refuse":
                    self._forget(entry)
            else:
                self._local.know(entry, verdict.quota_used)
                return verdict, False
        if self._without_store == "refuse":
            message = "the limits of this key cannot be checked at the moment (limits.without_store); try again"
            raise Overloaded("limits_unavailable", message, headers={"Retry-After": "1"})
        return await self._local.admit(entry), True

    def _forget(self, entry: Entry) -> None:
        """The shared ledger may have admitted this, and its answer was lost on the way."""
        self.settle(Grant({}, entry), 0)

    async def _settle_waiting(self) -> None:
        self._has_work.clear()
        while self._waiting:
            grant, billed = self._waiting[0]
            if grant.entry is not None and not await self._settled(grant, grant.entry, billed):
                # Tried again after the pause; until then nothing wakes but time.
                asyncio.get_running_loop().call_later(_PAUSE_SECONDS, self._has_work.set)
                return
            self._waiting.popleft()

    async def _settled(self, grant: Grant, entry: Entry, billed: int) -> bool:
        if self._shared is None:
            return True
        try:
            await (self._shared.charge if grant.is_local else self._shared.settle)(entry, billed)
        except Exception as error:
            self._pause(error)
            return False
        return True

    async def _renew(self) -> None:
        entries = [grant.entry for grant in self._open.values() if grant.entry is not None and not grant.is_local]
        if self._shared is None or not entries:
            return
        try:
            await self._shared.renew(entries)
        except Exception as error:
            self._pause(error)

    def _pause(self, error: Exception) -> None:
        if self._now() >= self._paused_until:
            _log.error("the shared limits cannot be reached (%s: %s)", type(error).__name__, error)
        self._paused_until = self._now() + _PAUSE_SECONDS


def _entry(caller: Caller, stream_id: str, reserved: int, today: datetime) -> Entry:
    plan = caller.plan
    period, ends = _period(plan.quota_period, today)
    return Entry(
        caller=caller.name,
        stream_id=stream_id,
        reserved=min(reserved, _MOST_RESERVED),
        requests=plan.requests_per_minute or 0,
        tokens=plan.tokens_per_minute or 0,
        streams=plan.streams or 0,
        quota=-1 if plan.quota_tokens is None else plan.quota_tokens,
        period=period,
        period_ends=ends,
    )


def _period(kind: Literal["day", "month"], today: datetime) -> tuple[str, int]:
    """Its name and the second at which the next one begins."""
    day = today.replace(hour=0, minute=0, second=0, microsecond=0)
    if kind == "day":
        return f"{day:%Y-%m-%d}", int((day + timedelta(days=1)).timestamp())
    following = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
    return f"{day:%Y-%m}", int(following.timestamp())


# --- What the caller is told --------------------------------------------------------------------------


def _headers(plan: Plan, verdict: Verdict) -> dict[str, str]:
    """OpenAI's names and OpenAI's spelling of times: `reset` is when the bucket is full again."""
    headers: dict[str, str] = {}
    for kind, cap, left in (
        ("requests", plan.requests_per_minute, verdict.requests_left),
        ("tokens", plan.tokens_per_minute, verdict.tokens_left),
    ):
        if cap is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(cap)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(left)))
            headers[f"x-ratelimit-reset-{kind}"] = spell_seconds((cap - left) * 60 / cap)
    return headers


def spell_seconds(seconds: float) -> str:
    """As Go spells a duration, and OpenAI with it: `12ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(max(0.0, seconds) * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 1000) / 1000, 60)
    spelled = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{spelled}s" if minutes else f"{spelled}s"


def _refused(entry: Entry, plan: Plan, verdict: Verdict, headers: dict[str, str], now: float) -> Problem:
    wait = verdict.retry_seconds
    told = {**headers, "Retry-After": str(max(1, math.ceil(wait)))}
    match verdict.refused:
        case "streams":
            what = f"{plan.streams} streams are open, the most that {entry.caller} may have; wait until one has ended"
            return Overloaded("too_many_streams_of_key", what, status=429, headers=told)
        case "requests":
            what = f"{entry.caller} may send {plan.requests_per_minute} requests a minute; wait {spell_seconds(wait)}"
        case "tokens":
            what = (
                f"{entry.caller} may use {plan.tokens_per_minute} tokens a minute and this request needs about "
                f"{entry.reserved}; wait {spell_seconds(wait)} or ask for fewer (max_tokens)"
            )
        case _:
            return _quota_problem(entry, plan, verdict, {**headers, "Retry-After": str(entry.period_ends - int(now))})
    return Overloaded("rate_limit_exceeded", what, status=429, headers=told)


def _quota_problem(entry: Entry, plan: Plan, verdict: Verdict, headers: dict[str, str]) -> Problem:
    left = max(0, entry.quota - verdict.quota_used)
    what = (
        f"{entry.caller} has {left} of {entry.quota} tokens left for this {plan.quota_period} and this request needs "
        f"about {entry.reserved}; ask for fewer (max_tokens) or wait for the next {plan.quota_period}"
    )
    return CallerError("insufficient_quota", what, status=429, headers=headers)
