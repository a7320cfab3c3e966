"""Tokens of an issuer (JWT): checked by PyJWT, with the keys that the issuer publishes.

The keys are fetched when the first token comes, again after `refresh_seconds`, and at once for a key id that is not
known, as after a rotation, but not more than every ten seconds. While the issuer does not answer, the keys count on
until they are `stale_seconds` old; then tokens are answered 503, since nobody can say whether they are good.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import orjson

from penstock.access_settings import DEFAULT_PLAN, Auth, JwtSettings, plan_named
from penstock.core.errors import CallerError, Overloaded
from penstock.settings import SettingsError
from penstock.shell.callers import Caller, challenged

try:
    import jwt
except ImportError:  # the extra `jwt` is not installed
    jwt = None  # type: ignore[assignment]  # `Tokens.load` refuses settings that need it

_log = logging.getLogger("penstock")

# An attacker who sends unknown key ids must not make us ask the issuer for each.
_BETWEEN_FETCHES = 10.0
_FETCH_SECONDS = 5.0
_MOST_JWKS_BYTES = 2**20
_MOST_NAME = 256


class Tokens:
    """Who a token is from. `close` it at the end."""

    def __init__(self, settings: JwtSettings, auth: Auth, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._plans = auth.plans
        self._clock = clock
        self._keys: list[jwt.PyJWK] = []
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._fetching: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, auth: Auth) -> "Tokens | None":
        """Raises `SettingsError` where a token cannot be checked here. Call it in the loop."""
        if auth.jwt is None:
            return None
        if jwt is None:
            raise SettingsError("auth.jwt: needs the extra `jwt`: pip install 'penstock[jwt]'")
        return cls(auth.jwt, auth, asyncio.get_running_loop().time)

    async def caller(self, token: str) -> Caller:
        """Raises `CallerError` (401, 403), or `Overloaded` where the issuer's keys cannot be had."""
        try:
            head = jwt.get_unverified_header(token)
            algorithm, key_id = head.get("alg"), head.get("kid")
        # PyJWT lets through what Python's JSON reader says of deep nesting.
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise challenged("invalid_token", "the token is no JWT", "invalid_token") from None
        if algorithm not in self._settings.algorithms:
            allowed = ", ".join(self._settings.algorithms)
            message = f"the token is signed by {algorithm!a}, which is none of auth.jwt.algorithms ({allowed})"
            raise challenged("invalid_token", message, "invalid_token")
        return self._caller_of(self._claims(token, await self._key(key_id, algorithm), algorithm))

    async def close(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})

    # -- what a token says -------------------------------------------------------------------------

    def _claims(self, token: str, key: Any, algorithm: str) -> Mapping[str, Any]:
        settings = self._settings
        required = ["exp", "iss", "aud", settings.principal_claim]
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway_seconds,
                options={"require": required},
            )
        except jwt.ExpiredSignatureError:
            message = "the token has expired; get a new one"
        except jwt.InvalidAudienceError:
            message = f"the token is for another audience; this is {settings.audience}"
        except jwt.InvalidIssuerError:
            message = f"the token is from another issuer; trusted is {settings.issuer}"
        except jwt.MissingRequiredClaimError as error:
            message = f"the token has no claim {error.claim!a}"
        except (jwt.PyJWTError, ValueError, RecursionError, OverflowError, TypeError):
            message = "the token is not good: wrong signature, not yet valid, or malformed"
        raise challenged("invalid_token", message, "invalid_token")

    def _caller_of(self, claims: Mapping[str, Any]) -> Caller:
        settings = self._settings
        name = claims[settings.principal_claim]
        # A name goes into logs and bills: no line breaks, no end.
        if not isinstance(name, str) or not name or len(name) > _MOST_NAME or not name.isprintable():
            message = f"the token's {settings.principal_claim} is no name: up to {_MOST_NAME} printable characters"
            raise challenged("invalid_token", message, "invalid_token")
        if settings.scope is not None and settings.scope not in _scopes(claims):
            message = f"the token does not have the scope {settings.scope}"
            raise challenged("insufficient_scope", message, "insufficient_scope", status=403)
        wanted = claims.get(settings.plan_claim) if settings.plan_claim else None
        try:
            plan = plan_named(self._plans, DEFAULT_PLAN if wanted is None else str(wanted))
        except ValueError:
            message = f"the token's {settings.plan_claim} names no plan of this deployment"
            raise CallerError("no_such_plan", message, status=403) from None
        return Caller(f"jwt:{name}", plan)

    # -- the issuer's keys -------------------------------------------------------------------------

    async def _key(self, key_id: Any, algorithm: str) -> Any:
        now = self._clock()
        age = None if self._fetched_at is None else now - self._fetched_at
        if age is None or age > self._settings.stale_seconds:
            await self._fetch()
        elif age > self._settings.refresh_seconds:
            self._begin_fetch()  # meanwhile the keys that are here are good enough
        found = self._find(key_id, algorithm)
        if found is None:
            await self._fetch()
            found = self._find(key_id, algorithm)
        if self._fetched_at is None or self._clock() - self._fetched_at > self._settings.stale_seconds:
            message = "the keys of the token's issuer cannot be had at the moment; try again"
            raise Overloaded("issuer_unavailable", message, headers={"Retry-After": "5"})
        if found is None:
            message = f"the token's key {key_id!a} is none of its issuer's; get a new token"
            raise challenged("invalid_token", message, "invalid_token")
        return found

    def _find(self, key_id: Any, algorithm: str) -> Any:
        """The key of that id; without an id only a set of one key leaves no doubt."""
        fitting = [key for key in self._keys if key_id is None or key.key_id == key_id]
        if len(fitting) != 1:
            return None
        key = fitting[0]
        told = key._jwk_data  # PyJWT guesses an algorithm where the set tells none, so the set itself is asked
        if told.get("use", "sig") != "sig" or told.get("alg", algorithm) != algorithm:
            return None
        return key.key

    async def _fetch(self) -> None:
        self._begin_fetch()
        if self._fetching is not None:
            await asyncio.wait({self._fetching})

    def _begin_fetch(self) -> None:
        now = self._clock()
        if self._fetching is not None or (self._tried_at is not None and now - self._tried_at < _BETWEEN_FETCHES):
            return
        self._tried_at = now
        self._fetching = asyncio.create_task(self._fetch_now())
        self._fetching.add_done_callback(self._fetched)

    def _fetched(self, _: "asyncio.Task[None]") -> None:
        self._fetching = None

    async def _fetch_now(self) -> None:
        try:
            body = await _read(self._settings.jwks_url)
            keys = jwt.PyJWKSet.from_dict(orjson.loads(body)).keys
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, AttributeError, jwt.PyJWTError) as error:
            _log.error("auth.jwt.jwks_url %s: %s: %s", self._settings.jwks_url, type(error).__name__, error)
            return
        self._keys, self._fetched_at = keys, self._clock()


def _scopes(claims: Mapping[str, Any]) -> list[Any]:
    told = claims.get("scope", claims.get("scp", ""))
    return told.split() if isinstance(told, str) else told if isinstance(told, list) else []


async def _read(url: str) -> bytes:
    timeout = aiohttp.ClientTimeout(total=_FETCH_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, raise_for_status=True) as response:
        body = await response.content.read(_MOST_JWKS_BYTES)
        while len(body) < _MOST_JWKS_BYTES and (more := await response.content.read(_MOST_JWKS_BYTES - len(body))):
            body += more
        if len(body) >= _MOST_JWKS_BYTES:
            raise ValueError(f"the answer is longer than {_MOST_JWKS_BYTES} bytes")
        return body
