"""Who asks: API keys, known only by their hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from penstock.core.errors import CallerError
from penstock.settings import Auth, SettingsError, hashed_key

ANONYMOUS = "anonymous"


def hash_key(key: str) -> str:
    """The form in which a key may be stored. Keys are long and random, so one round of SHA-256 does."""
    # Bytes that are no UTF-8 come out of a header as lone surrogates; they are a wrong key, not a fault.
    return "sha256:" + hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class Keyring:
    """The keys of this deployment. Without any, everybody is `anonymous` and the engine's own keys decide."""

    def __init__(self, names_by_hash: Mapping[str, str]) -> None:
        self._names_by_hash = dict(names_by_hash)

    @classmethod
    def load(cls, auth: Auth) -> "Keyring":
        """Keys of the settings and of the file. Raises `SettingsError` naming file and line."""
        names = {hashed: name for name, hashed in auth.keys.items()}
        if auth.keys_file is not None:
            names |= _read_keys(auth.keys_file)
        return cls(names)

    def __bool__(self) -> bool:
        return bool(self._names_by_hash)

    def authenticate(self, headers: Mapping[str, str]) -> str:
        """The principal's name. Raises `CallerError` (401) with the challenge that RFC 9110 asks for."""
        if not self._names_by_hash:
            return ANONYMOUS
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("X-Api-Key", "")
        # Looked up by its hash, so that the time taken tells nothing about a stored key.
        name = self._names_by_hash.get(hash_key(key)) if key else None
        if name is None:
            what = "is not known here" if key else "is missing; send Authorization: Bearer <key>"
            challenge = {"WWW-Authenticate": 'Bearer realm="penstock"'}
            raise CallerError("invalid_api_key", f"the API key {what}", status=401, headers=challenge)
        return name


def _read_keys(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"auth.keys_file: {path} cannot be read: {error}") from None
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        name, _, hashed = (part.strip() for part in entry.partition("="))
        try:
            names[hashed_key(hashed)] = name
        except ValueError as error:
            raise SettingsError(f"auth.keys_file: {path} line {number}: {error}") from None
    if not names:
        raise SettingsError(f"auth.keys_file: {path} holds no key; add a line like name=sha256:<hex>")
    return names
