"""Who asks: the gate before every route, and the API keys, known only by their hash and read again when they change."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from penstock.access_settings import DEFAULT_PLAN, Auth, KeyEntry, key_name, plan_named, read_key
from penstock.settings import SettingsError
from penstock.shell.callers import Caller, challenged
from penstock.shell.tls import certificate_name
from penstock.shell.tokens import Tokens
from penstock.shell.watched import fingerprint

_log = logging.getLogger("penstock")

ANONYMOUS = "anonymous"
# The only routes that answer without a key. Every other one, a new one too, goes through `Gatekeeper.admit`.
OPEN_ROUTES = frozenset({"/healthz", "/readyz", "/v1/schema"})


_CALLER = web.RequestKey("_CALLER", Caller)


def caller_of(http: web.Request) -> Caller:
    """Who sent this request; every route that is not open has one."""
    return http[_CALLER]


def hash_key(key: str) -> str:
    """The form in which a key may be stored. Keys are long and random, so one round of SHA-256 does."""
    # Bytes that are no UTF-8 come out of a header as lone surrogates; they are a wrong key, not a fault.
    return "sha256:" + hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True)
class _Key:
    caller: Caller
    expires: float | None  # seconds since the epoch


class Keyring:
    """The keys of this deployment at one moment, never changed: a reload makes another."""

    def __init__(self, keys: Mapping[str, _Key]) -> None:
        self._keys = dict(keys)

    @classmethod
    def load(cls, auth: Auth) -> "Keyring":
        """Keys of the settings and of the file. Raises `SettingsError` naming file and line."""
        keys: dict[str, _Key] = {}
        for name, text in auth.keys.items():
            try:
                entry = read_key(text)
                keys[entry.hashed] = _made(name, entry, auth)
            except ValueError as error:
                raise SettingsError(f"auth.keys.{name}: {error}") from None
        if auth.keys_file is not None:
            keys |= _read_keys(auth.keys_file, auth)
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, key: str, now: float) -> Caller | None:
        """Whose key this is at `now`, in seconds since the epoch; None for one that is unknown or has expired."""
        # Looked up by its hash, so that the time taken tells nothing about a stored key.
        found = self._keys.get(hash_key(key))
        return None if found is None or (found.expires is not None and found.expires <= now) else found.caller


def _made(name: str, entry: KeyEntry, auth: Auth) -> _Key:
    return _Key(Caller(name, entry.allowed(auth.plans)), entry.expires.timestamp() if entry.expires else None)


def _read_keys(path: Path, auth: Auth) -> dict[str, _Key]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"auth.keys_file: {path} cannot be read: {error}") from None
    keys: dict[str, _Key] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, _, stored = (part.strip() for part in text.partition("="))
        try:
            entry = read_key(stored)
            keys[entry.hashed] = _made(key_name(name), entry, auth)
        except ValueError as error:
            raise SettingsError(f"auth.keys_file: {path} line {number}: {error}") from None
    if not keys:
        raise SettingsError(f"auth.keys_file: {path} holds no key; add a line like name=sha256:<hex>")
    return keys


class Gatekeeper:
    """Lets in whom the settings know. Without any keys everybody is `anonymous` and the engine's own keys decide."""

    def __init__(self, auth: Auth, keyring: Keyring, tokens: Tokens | None, *, certificates: bool = False) -> None:
        self._auth = auth
        self._keyring = keyring
        self._tokens = tokens
        self._certificates = certificates
        self._seen = fingerprint(auth.keys_file)
        self._default = plan_named(auth.plans, DEFAULT_PLAN)

    @classmethod
    async def load(cls, auth: Auth, *, certificates: bool = False) -> "Gatekeeper":
        """`certificates` says that callers need one, be it beside a key. Raises `SettingsError`."""
        return cls(auth, await asyncio.to_thread(Keyring.load, auth), Tokens.load(auth), certificates=certificates)

    @property
    def asks_for_keys(self) -> bool:
        return bool(self._keyring) or self._tokens is not None

    @property
    def lets_anybody_in(self) -> bool:
        return not self.asks_for_keys and not self._certificates

    async def admit(self, http: web.Request) -> None:
        """Tells the request its caller. Raises `CallerError` (401, 403), or `Overloaded` where nobody can say."""
        certificate = certificate_name(http) if self._certificates else None
        if self._certificates and certificate is None:
            raise challenged(
                "client_certificate_required", "this needs a client certificate (listen.tls.client_ca_file)"
            )
        if self._certificates and not self.asks_for_keys:
            http[_CALLER] = Caller(f"cert:{certificate}", self._default)
        else:
            http[_CALLER] = await self.authenticate(http.headers)

    async def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """Who has these headers; `anonymous` where there are no keys at all."""
        if not self.asks_for_keys:
            return Caller(ANONYMOUS, self._default)
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("X-Api-Key", "")
        if not key:
            raise challenged("invalid_api_key", "the API key is missing; send Authorization: Bearer <key>")
        caller = self._keyring.find(key, time.time())
        if caller is not None:
            return caller
        if self._tokens is not None and key.count(".") == 2:
            return await self._tokens.caller(key)
        raise challenged("invalid_api_key", "the API key is not known here, or has expired")

    async def close(self) -> None:
        if self._tokens is not None:
            await self._tokens.close()

    async def reload(self) -> None:
        """Takes the keys over if their file changed and is right; a file that is wrong changes nothing."""
        seen = await asyncio.to_thread(fingerprint, self._auth.keys_file)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keyring = await asyncio.to_thread(Keyring.load, self._auth)
        except SettingsError as error:
            _log.error("the keys in use stay as they were: %s", error)
        else:
            _log.info("the keys were read again from %s", self._auth.keys_file)
