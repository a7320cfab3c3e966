"""The settings that say who may do what, and how much of it: a part of `settings.py`, which explains the whole."""

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

_HASHED_KEY = re.compile(r"sha256:[0-9a-f]{64}")
# A principal's name goes into logs, bills and the keys of Redis; `:` parts those of tokens and certificates off.
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
DEFAULT_PLAN = "default"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _web_url(url: str) -> str:
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ValueError("must be a URL like https://login.example/.well-known/jwks.json")
    return url


class Plan(_Part):
    """What one principal may use. None is no limit of its own."""

    requests_per_minute: int | None = Field(None, ge=1, description="requests; as many at once, then evenly")
    tokens_per_minute: int | None = Field(None, ge=1, description="tokens, prompt and answer; as many at once")
    streams: int | None = Field(None, ge=1, description="streams open at once; limits.streams_per_key by default")
    quota_tokens: int | None = Field(None, ge=0, description="billed tokens in a period")
    quota_period: Literal["day", "month"] = Field("month", description="the period of the quota, by the UTC calendar")
    models: list[str] = Field(["*"], min_length=1, description="shell patterns of the models that may be asked for")

    @field_validator("models", mode="before")
    @classmethod
    def _from_a_word(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value


class KeyEntry(_Part):
    """One key as it is stored: its hash, until when it is good, and what its holder may use."""

    hashed: str
    expires: AwareDatetime | None = None
    plan: str = DEFAULT_PLAN
    overrides: dict[str, Any] = Field(default_factory=dict)

    def allowed(self, plans: dict[str, Plan]) -> Plan:
        """The plan with this key's own words over it. Raises `ValueError` naming the plan that is not there."""
        return _merged(plan_named(plans, self.plan), self.overrides)


def plan_named(plans: dict[str, Plan], name: str) -> Plan:
    if name not in plans and name != DEFAULT_PLAN:
        known = ", ".join(sorted({*plans, DEFAULT_PLAN}))
        raise ValueError(f"plan {name!r} is not one of auth.plans ({known})")
    return plans.get(name) or Plan()


def read_key(text: str) -> KeyEntry:
    """Reads `sha256:HEX [plan=NAME] [expires=TIME] [LIMIT=VALUE …]`. Raises `ValueError` with the remedy."""
    hashed, *words = text.split() or [""]
    if not _HASHED_KEY.fullmatch(hashed):
        raise ValueError("must be sha256:<64 hex digits>, never the key itself; `penstock hash-key` makes one")
    options = dict(word.partition("=")[::2] for word in words)
    known = ["plan", "expires", *Plan.model_fields]
    for name in options:
        if name not in known:
            raise ValueError(f"{name!r} is nothing that a key can have; write NAME=VALUE, of {', '.join(known)}")
    try:
        expires = datetime.fromisoformat(options.pop("expires")) if "expires" in options else None
        entry = KeyEntry(hashed=hashed, expires=expires, plan=options.pop("plan", DEFAULT_PLAN), overrides=options)
        _merged(Plan(), entry.overrides)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"][:1]))
        remedy = ", like expires=2027-01-31T00:00:00Z" if name == "expires" else ""
        raise ValueError(f"{name}={fault['input']}: {fault['msg']}{remedy}") from None
    return entry


def _merged(plan: Plan, overrides: dict[str, Any]) -> Plan:
    return Plan.model_validate({**plan.model_dump(), **overrides})


def _stored_key(text: str) -> str:
    read_key(text)
    return text


def key_name(name: str) -> str:
    if not _KEY_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a caller; use up to 128 letters, digits and . _ @ -")
    return name


StoredKey = Annotated[str, AfterValidator(_stored_key)]
KeyName = Annotated[str, AfterValidator(key_name)]


Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class JwtSettings(_Part):
    """Only signatures by a private key: with a shared secret, whoever can check a token could make one."""

    issuer: str = Field(min_length=1, description="the `iss` that a token must have, to the letter")
    audience: str = Field(min_length=1, description="the `aud` that a token must have, or one of its list")
    jwks_url: Annotated[str, AfterValidator(_web_url)] = Field(description="where the issuer publishes its keys")
    algorithms: list[Algorithm] = Field(["RS256", "ES256"], min_length=1, description="how a token may be signed")
    leeway_seconds: float = Field(30, ge=0, le=600, description="by how much clocks may differ")
    refresh_seconds: float = Field(300, gt=0, description="age at which the issuer's keys are fetched again")
    stale_seconds: float = Field(86400, gt=0, description="age up to which keys count while jwks_url is gone; then 503")
    principal_claim: str = Field("sub", min_length=1, description="the claim that names the caller, as jwt:VALUE")
    plan_claim: str | None = Field(None, description="the claim that names one of auth.plans, otherwise `default`")
    scope: str | None = Field(None, description="a word that `scope` or `scp` must hold, else 403")


class Tls(_Part):
    cert_file: Path = Field(description="the certificate and those between it and its root, PEM")
    key_file: Path = Field(description="its private key, PEM, without a password")
    client_ca_file: Path | None = Field(
        None, description="roots of client certificates; then every route but health and schema needs one"
    )


class Cors(_Part):
    origins: list[str] = Field(
        default_factory=list, description="origins of web pages that may call, like https://app.example; or '*'"
    )
    max_age_seconds: int = Field(600, ge=0, description="how long a browser need not ask again")

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (
                parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin!r} is no origin; write it like https://app.example, without a path")
        return origins


class Auth(_Part):
    keys_file: Path | None = Field(None, description="file of hashed keys, a line each: name=sha256:<hex> and options")
    keys: dict[KeyName, StoredKey] = Field(
        default_factory=dict, description="name -> sha256:<hex of the key> and options"
    )
    jwt: JwtSettings | None = Field(None, description="tokens of an issuer, beside keys (extra `jwt`)")
    allow_anonymous: bool = Field(False, description="serve without keys beyond loopback; only behind your own gate")
    reload_seconds: float = Field(5, gt=0, description="how often files of keys and certificates are looked at again")
    plans: dict[str, Plan] = Field(
        default_factory=dict, description="what callers may use, by the name that a key gives; `default` for the rest"
    )


class UsageFile(_Part):
    path: Path = Field(description="one line of JSON for each stream that ended; opened anew for every write")
    rotate_bytes: int = Field(100 * 2**20, ge=0, description="size at which it becomes PATH.1; 0 leaves that to others")
    keep: int = Field(10, ge=1, description="rotated files that are kept: PATH.1 is the youngest")


class UsageSettings(_Part):
    bill: Literal["generated", "delivered"] = Field(
        "generated", description="which tokens of an answer count for bills, quotas and tokens_per_minute"
    )
    file: UsageFile | None = Field(None, description="records as lines of JSON")
    otlp: bool = Field(False, description="records as OTLP logs, to where OTEL_EXPORTER_OTLP_* says")
    redis_stream: str | None = Field(None, min_length=1, description="records to the stream of this name at store.url")
    redis_stream_records: int = Field(1_000_000, ge=1, description="about how many records that stream keeps")
