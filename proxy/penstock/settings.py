"""Every setting once: its type, its default, what it means and what to do when it is wrong.

Settings come from flags, `PENSTOCK_*` variables and one YAML file, in that order of precedence. A wrong one is a
`SettingsError` that names the key, the value, where it came from and the remedy.
"""

import os
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from penstock.access_settings import Auth, Cors, Tls, UsageSettings
from penstock.core.channels import ReasoningPolicy
from penstock.core.families import FAMILIES, Family, State, thinking_family
from penstock.core.pacing import Measure, SlowClient
from penstock.moderation_settings import AuditSettings, ModerationSettings
from penstock.tool_settings import Annotations, Tools

_PREFIX = "PENSTOCK_"
# The flag of a setting is the last word of its key, but for these.
_FLAGS = {"upstreams": "--upstream"}
# Values that are never shown, not even where they are wrong: a key is easily put in the place of its hash.
_SECRET = re.compile(r"auth\.keys\b.*|.*\bapi_key\b.*|store\.url")


class SettingsError(Exception):
    """A setting is wrong; the text names key, value, source and remedy, a line each."""


def _http_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL like http://vllm:8000")
    if parts.query or parts.fragment:
        raise ValueError("must not have a query or a fragment")
    return url.rstrip("/").removesuffix("/v1")


def _redis_url(url: SecretStr) -> SecretStr:
    if urlsplit(url.get_secret_value()).scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must be a URL like redis://redis:6379/0, rediss://… or unix:///run/redis.sock")
    return url


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


Url = Annotated[str, AfterValidator(_http_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Part):
    host: str = Field("127.0.0.1", description="address to listen on; anything but loopback needs API keys")
    port: int = Field(8080, ge=0, le=65535, description="TCP port; 0 lets the system choose")
    tls: Tls | None = Field(None, description="serve HTTPS; the files are read again when they change")
    cors: Cors = Field(Cors(), description="which web pages may call from a browser")


class Upstream(_Part):
    url: Url = Field(description="base URL of a vLLM server, e.g. http://vllm:8000")
    name: str = Field("", description="how events and traces call it; its host and port by default")
    api_key: SecretStr | None = Field(None, description="sent to the engine as its bearer token")
    socket: Path | None = Field(
        None, description="Unix socket to reach it by (vLLM's --uds); the URL's host is then a name"
    )
    plugin: Literal["auto", "off"] = Field("auto", description="off reads plain chunks even where the plugin is loaded")
    running_usage: bool = Field(True, description="ask for a token count with every chunk; off for engines without it")
    parses_tools: bool = Field(
        True, description="false for a vLLM without --tool-call-parser: Penstock then reads the calls from the text"
    )

    zone: str = Field("", description="where it stands; see routing.zone")
    discover: Literal["off", "dns"] = Field(
        "off", description="dns: each address of the URL's host is an engine, looked up again and again"
    )
    weight: float = Field(1, gt=0, description="its share of the requests beside the others'")

    @model_validator(mode="after")
    def _has_a_name_to_look_up(self) -> "Upstream":
        if self.discover == "dns" and (self.socket or _is_address(urlsplit(self.url).hostname or "")):
            raise ValueError(
                "discover: dns needs a host name in url, such as that of a headless service, and no socket"
            )
        return self

    @property
    def label(self) -> str:
        return self.name or urlsplit(self.url).netloc

    @property
    def place(self) -> str:
        """Where it is reached; no two upstreams have the same."""
        return f"{self.url} ({self.socket})" if self.socket else self.url


class Routing(_Part):
    """How one of several engines is chosen, and when one is left alone."""

    zone: str = Field("", description="Penstock's own zone: its engines come first unless each has requests waiting")
    zone_header: str = Field("", description="header in which a trusted proxy names the caller's zone instead")
    affinity: Literal["none", "prefix", "session"] = Field(
        "none", description="which requests go to the same engine: none, prompts that begin alike, those of a session"
    )
    prefix_bytes: int = Field(4096, ge=1, description="how much of a prompt's beginning counts for affinity: prefix")
    session_header: str = Field("X-Session-Id", description="header that names the session for affinity: session")
    retries: int = Field(
        1, ge=0, description="other engines that a request is given to after one failed on it before its first token"
    )
    load_bound: float = Field(
        1.25,
        ge=1,
        description="an engine with this many times its share of the streams gets no more for affinity's sake",
    )
    free_streams: int = Field(8, ge=1, description="an engine with fewer streams is never too busy for affinity")
    health_seconds: float = Field(5, gt=0, description="how often an engine's /health is asked")
    unhealthy_after: int = Field(2, ge=1, description="failed answers in a row after which an engine gets no requests")
    healthy_after: int = Field(2, ge=1, description="good answers in a row after which it gets them again")
    circuit_failures: int = Field(3, ge=1, description="failed requests in a row after which an engine is paused")
    circuit_seconds: float = Field(5, gt=0, description="first pause; it doubles while the engine goes on failing")
    circuit_longest_seconds: float = Field(60, gt=0, description="longest pause")
    read_load: bool = Field(True, description="count what other clients run on an engine, read from its /metrics")
    models_seconds: float = Field(30, gt=0, description="how often an engine is asked for its models")
    dns_seconds: float = Field(10, gt=0, description="how often the names of discover: dns are looked up")
    refuse_long_prompts: bool = Field(True, description="refuse a prompt that fits no engine's context window at once")


class StateSettings(_Part):
    channel: Literal["answer", "reasoning", "tool", "markup"] = Field(description="where the text of this state goes")
    markers: dict[str, str] = Field(default_factory=dict, description="marker -> next state")
    otherwise: str | None = Field(None, description="state entered by anything but space and a marker")
    headers: list[tuple[str, str]] = Field(default_factory=list, description="[pattern, state] pairs, first match wins")
    syntax: Literal["", "hermes", "arguments"] = Field("", description="how a tool state spells a call")


class ReasoningMarks(_Part):
    open: str = Field(min_length=1, description="marker before the reasoning")
    close: str = Field(min_length=1, description="marker after the reasoning")
    opened_by_template: bool = Field(False, description="true where the chat template writes the opening marker")


class ToolMarks(_Part):
    open: str = Field(min_length=1, description="marker before a call")
    close: str = Field(min_length=1, description="marker after a call")
    syntax: Literal["hermes", "arguments"] = Field("hermes", description="how the call is written between them")


class FamilySettings(_Part):
    """A family by its marks, or by its states; a built-in family's name with only `models` adds to that family."""

    models: list[str] = Field(description="shell patterns of model names, e.g. ['my-model*']")
    reasoning: ReasoningMarks | None = Field(None, description="the marks around reasoning")
    tools: ToolMarks | None = Field(None, description="the marks around tool calls")
    start: str = Field("", description="the state of the first token, where states are given")
    states: dict[str, StateSettings] = Field(default_factory=dict, description="a full state table")

    @model_validator(mode="after")
    def _one_way(self) -> "FamilySettings":
        if self.states and (self.reasoning or self.tools):
            raise ValueError("give either states or reasoning and tools, not both")
        if self.states and self.start not in self.states:
            raise ValueError(f"start must name one of the states: {', '.join(self.states)}")
        return self

    def build(self, name: str) -> Family:
        built_in = next((family for family in FAMILIES if family.name == name), None)
        if self.states:
            states = {
                key: State(s.channel, s.markers, s.otherwise, tuple(s.headers), s.syntax)
                for key, s in self.states.items()
            }
            return Family(name, tuple(self.models), self.start, self.start, states)
        if built_in and not self.reasoning and not self.tools:
            start, thoughtless = built_in.start, built_in.start_without_thinking
            return Family(name, tuple(self.models), start, thoughtless, built_in.states)
        reasoning, tools = self.reasoning, self.tools
        return thinking_family(
            name,
            self.models,
            reasoning=(reasoning.open, reasoning.close) if reasoning else None,
            opened_by_template=bool(reasoning and reasoning.opened_by_template),
            tools=(tools.open, tools.close) if tools else None,
            tool_syntax=tools.syntax if tools else "",
        )


class Limits(_Part):
    request_bytes: int = Field(10 * 2**20, ge=1024, description="largest request body")
    line_bytes: int = Field(2**20, ge=1024, description="longest line or event that an engine may send")
    tool_call_bytes: int = Field(2**20, ge=1024, description="bytes of one tool call after which its stream is ended")
    stream_bytes: int = Field(16 * 2**20, ge=1024, description="bytes of one stream after which it is ended")
    buffer_bytes: int = Field(256 * 2**10, ge=4096, description="bytes that may wait for a client that reads slowly")
    stream_seconds: float = Field(600, gt=0, description="seconds after which a stream is ended")
    streams: int = Field(2000, ge=1, description="open streams of this replica, past which new ones get 503")
    streams_per_key: int = Field(
        100, ge=1, description="streams that one caller may have open, unless its plan says; past it 429"
    )
    held_bytes: int = Field(256 * 2**20, ge=1024, description="bytes that all open streams may hold, then 503")
    held_bytes_per_key: int = Field(
        64 * 2**20, ge=1024, description="bytes that those of one caller may hold, then 429"
    )
    reserve_tokens: int = Field(
        1024, ge=0, description="tokens counted for an answer without max_tokens until its bill is known"
    )
    without_store: Literal["local", "refuse"] = Field(
        "local", description="when store.url is gone, limits of keys: each replica counts alone, or 503"
    )


class SlowClientSettings(_Part):
    measures: list[Measure] = Field(
        ["merge", "shed", "pause", "cut"], description="what is done, in this order; limits.buffer_bytes holds anyhow"
    )
    stall_seconds: float = Field(30, gt=0, description="cut: a client that takes nothing for so long is cut off")
    socket_bytes: int = Field(
        128 * 2**10, ge=4096, description="send buffer of each client's socket; the kernel doubles it"
    )


class StoreSettings(_Part):
    url: RedisUrl | None = Field(
        None, description="Redis that the replicas share, e.g. redis://redis:6379/0 (extra `redis`); absent: memory"
    )
    retention_seconds: float = Field(
        300, ge=0, description="how long a stream can be resumed after its last event; 0 keeps no log at all"
    )
    linger_seconds: float = Field(
        60, ge=0, description="how long a stream that lingers goes on while nobody reads it, before it is cancelled"
    )
    memory_bytes: int = Field(256 * 2**20, ge=2**16, description="bytes of logs that this process keeps")
    prefix: str = Field("penstock", pattern=r"^[\w.-]{1,64}$", description="first word of every key in Redis")
    lease_seconds: float = Field(
        10, ge=0.3, description="silence after which a replica counts as dead and its streams are ended by another"
    )
    timeout_seconds: float = Field(2, gt=0, description="time that Redis gets for an answer")
    on_failure: Literal["continue", "end"] = Field(
        "continue", description="when Redis is gone: streams go on, resumable at their replica only, or end"
    )


class Timing(_Part):
    request_seconds: float = Field(60, gt=0, description="time that a request's body may take to come in")
    connect_seconds: float = Field(5, gt=0, description="time for a connection to the engine")
    first_byte_seconds: float = Field(1, gt=0, description="the head of a stream waits no longer for the first token")
    heartbeat_seconds: float = Field(15, gt=0, description="silence after which a heartbeat is sent")
    engine_silence_seconds: float = Field(20, gt=0, description="silence after which the engine's health is asked")
    keepalive_seconds: float = Field(
        75, gt=0, description="silence after which a connection is closed on which no request came or is being sent"
    )
    drain_seconds: float = Field(30, ge=0, description="time that open streams get after SIGTERM")
    closing_seconds: float = Field(10, gt=0, description="time that a client gets to take the last bytes")


class PreparedSettings(_Part):
    """An answer that no engine is asked for."""

    id: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="its name; stream.start names answers/<id> as upstream")
    question: str = Field(min_length=1, description="regular expression of the whole last question, in any case")
    text: str = Field(min_length=1, description="the answer; $model and $NAME of a group (?P<NAME>...) are filled in")
    models: list[str] = Field(default_factory=lambda: ["*"], description="shell patterns of model names")
    words_per_second: float = Field(30, gt=0, description="how fast it is told")

    @model_validator(mode="after")
    def _is_a_pattern(self) -> "PreparedSettings":
        try:
            re.compile(self.question)
        except re.error as error:
            raise ValueError(f"question {self.question!r} is no regular expression: {error}") from None
        return self


class AnswerCacheSettings(_Part):
    """Engines' answers that are told again, from the memory of this replica."""

    requests: Literal["none", "asked", "deterministic"] = Field(
        "none", description="whose answers: nobody's, of those that say `penstock.cache: true`, of temperature 0 too"
    )
    seconds: float = Field(300, gt=0, description="how long an answer is told again after its engine gave it")
    answers: int = Field(1000, ge=1, description="answers that are kept; the one not asked for longest goes first")
    bytes: int = Field(64 * 2**20, ge=1024, description="bytes that all of them may hold")
    answer_bytes: int = Field(256 * 2**10, ge=1024, description="a larger answer is not kept")
    across_callers: bool = Field(False, description="true: an answer that one caller got is told to others too")
    words_per_second: float = Field(30, gt=0, description="how fast it is told")

    @model_validator(mode="after")
    def _one_fits_in_all(self) -> "AnswerCacheSettings":
        if self.answer_bytes > self.bytes:
            raise ValueError(f"answer_cache.answer_bytes ({self.answer_bytes}) is more than answer_cache.bytes allows")
        return self


# Passed through as they are, these would go by moderation, limits and the bill, or let callers at the plugin.
_NEVER_PASSED = re.compile(
    r"/(v1/(chat|completions|responses|messages|models|schema|streams|ws|penstock)|v2/|inference/|invocations|generate"
    r"|healthz|readyz|metrics|console)(/|$)?"
)


def _passed_route(route: str) -> str:
    if not re.fullmatch(r"(GET|POST) (/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+", route):
        raise ValueError("must be a method and a path, such as POST /tokenize")
    if _NEVER_PASSED.match(route.split()[1]):
        raise ValueError(
            "is a route of Penstock itself, or one that answers with generated text, which must not go by moderation, "
            "limits and usage"
        )
    return route


class Settings(_Part):
    listen: Listen = Field(Listen(), description="where clients connect")
    upstreams: list[Upstream] = Field(min_length=1, description="the vLLM servers")
    reasoning: ReasoningPolicy = Field("separate", description="separate, hide or inline, unless a request says so")
    families: dict[str, FamilySettings] = Field(default_factory=dict, description="model families added without code")
    auth: Auth = Field(Auth(), description="who may use this")
    limits: Limits = Field(Limits(), description="caps, in bytes and seconds")
    slow_client: SlowClientSettings = Field(
        SlowClientSettings(), description="what is done about clients that read slowly"
    )
    moderation: ModerationSettings = Field(ModerationSettings(), description="rules that every answer is held against")
    audit: AuditSettings = Field(AuditSettings(), description="what is written down about moderation")
    timing: Timing = Field(Timing(), description="times, in seconds")
    tools: Tools = Field(Tools(), description="tool calls")
    annotations: Annotations = Field(Annotations(), description="notes beside the text")
    routing: Routing = Field(Routing(), description="which of several engines answers")
    passthrough: list[Annotated[str, AfterValidator(_passed_route)]] = Field(
        default_factory=list, description="other routes of the engines to pass on, such as POST /tokenize"
    )
    answers: list[PreparedSettings] = Field(
        default_factory=list, description="answers to known questions, told without an engine; the first that fits"
    )
    answer_cache: AnswerCacheSettings = Field(
        AnswerCacheSettings(), description="answers of engines that are told again, without an engine"
    )
    store: StoreSettings = Field(
        StoreSettings(), description="the logs that streams are resumed from, and what replicas share"
    )
    usage: UsageSettings = Field(UsageSettings(), description="what is billed, and where each stream's record goes")

    @model_validator(mode="after")
    def _never_an_open_relay(self) -> "Settings":
        has_certificates = bool(self.listen.tls and self.listen.tls.client_ca_file)
        has_keys = bool(self.auth.keys or self.auth.keys_file or self.auth.jwt or has_certificates)
        if not has_keys and not self.is_loopback and not self.auth.allow_anonymous:
            raise ValueError(
                f"listen.host {self.listen.host!r} is not loopback and there are no API keys; set auth.keys_file, "
                "auth.keys, auth.jwt or listen.tls.client_ca_file, listen on 127.0.0.1, or set auth.allow_anonymous "
                "where something else guards this port"
            )
        return self

    @model_validator(mode="after")
    def _upstreams_fit_together(self) -> "Settings":
        places = [upstream.place for upstream in self.upstreams]
        if twice := next((place for place in places if places.count(place) > 1), None):
            raise ValueError(f"upstreams: {twice} stands there twice; name each engine once, with a weight if need be")
        # One reading of the request serves all, wherever it goes and is sent again.
        for name in ("running_usage", "parses_tools"):
            if len({getattr(upstream, name) for upstream in self.upstreams}) > 1:
                raise ValueError(f"upstreams: {name} must be the same for all, since each may get any request")
        return self

    @model_validator(mode="after")
    def _shared_things_have_a_place(self) -> "Settings":
        if self.usage.redis_stream is not None and self.store.url is None:
            raise ValueError("usage.redis_stream is set and store.url is not; say which Redis with store.url")
        return self

    @model_validator(mode="after")
    def _families_are_sound(self) -> "Settings":
        for name, family in self.families.items():
            try:
                family.build(name)
            except (ValueError, re.error) as error:
                raise ValueError(f"families.{name}: {error}") from None
        return self

    @property
    def is_loopback(self) -> bool:
        if self.listen.host == "localhost":
            return True
        try:
            return ip_address(self.listen.host).is_loopback
        except ValueError:
            return False  # a name, and names may lead anywhere

    @property
    def pacing(self) -> SlowClient:
        slow = self.slow_client
        return SlowClient(frozenset(slow.measures), self.limits.buffer_bytes, slow.stall_seconds)

    def all_families(self) -> tuple[Family, ...]:
        """The families of the settings first, then the built-in ones."""
        return (*(family.build(name) for name, family in self.families.items()), *FAMILIES)


def load_settings(
    config: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings of the YAML file `config`, under `PENSTOCK_*` variables, under `flags` (dotted keys).

    Raises `SettingsError`.
    """
    sources: dict[str, str] = {}
    try:
        return Settings.model_validate(_merged(config, environment, flags, sources))
    except ValidationError as error:
        raise SettingsError("\n".join(_sentences(error, sources))) from None
    except RecursionError:
        raise SettingsError("the settings are nested too deeply, or a part holds itself by a YAML alias") from None


def _merged(
    config: Path | None,
    environment: Mapping[str, str] | None,
    flags: Mapping[str, Any] | None,
    sources: dict[str, str],
) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    if config is not None:
        _merge(merged, _read_file(config), sources, str(config))
    for name, path, value in _variables(os.environ if environment is None else environment):
        _merge(merged, _nested(path, value), sources, name)
    for key, value in (flags or {}).items():
        if value is not None:
            flag = _FLAGS.get(key, f"--{key.split('.')[-1].replace('_', '-')}")
            _merge(merged, _nested(key.split("."), value), sources, flag)
    return merged


def _read_file(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); give an existing file to --config") from None
    except (yaml.YAMLError, ValueError) as error:  # a number of thousands of digits, a date that is none, no UTF-8
        raise SettingsError(f"{path}: is not YAML: {error}") from None
    if not isinstance(loaded, dict | None):
        raise SettingsError(f"{path}: must hold a mapping of settings, like `listen: {{port: 8080}}`")
    return loaded or {}


def _variables(environment: Mapping[str, str]) -> Iterator[tuple[str, list[str], Any]]:
    """Variables that name a setting. Others with the prefix are left alone: Kubernetes adds PENSTOCK_PORT and such."""
    for name in sorted(environment):
        path = name.removeprefix(_PREFIX).lower().split("__")
        if name.startswith(_PREFIX) and path[0] in Settings.model_fields:
            try:
                yield name, path, yaml.safe_load(environment[name])
            except (yaml.YAMLError, ValueError) as error:
                raise SettingsError(f"{name}: {environment[name]!r} cannot be read: {error}") from None


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def _merge(into: dict[str, Any], new: Mapping[str, Any], sources: dict[str, str], source: str, at: str = "") -> None:
    for key, value in new.items():
        path = f"{at}.{key}" if at else str(key)
        sources[path] = source
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value, sources, source, path)
        elif isinstance(value, Mapping):
            into[key] = {}
            _merge(into[key], value, sources, source, path)
        else:
            into[key] = value


def _sentences(error: ValidationError, sources: Mapping[str, str]) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        path = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        if not path:
            yield message
            continue
        source = next((sources[p] for p in _parents(path) if p in sources), None)
        where = f" (from {source})" if source else ""
        if fault["type"] == "missing":
            yield f"{path}: is missing. It is {_meaning(path)}"
        elif fault["type"] == "extra_forbidden":
            yield f"{path}{where}: is no setting. {_siblings(path)}"
        else:
            value = "its value" if _SECRET.fullmatch(path) else _shown(fault["input"])
            yield f"{path}: {value}{where} is wrong: {message}. It is {_meaning(path)}"


def _parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _model_at(path: list[str]) -> type[BaseModel] | None:
    """The settings class that the last key of `path` belongs to."""
    model: type[BaseModel] = Settings
    for key in path[:-1]:
        field = model.model_fields.get(key)
        if field is None:
            continue  # an index of a list or a key of a mapping
        found = next((part for part in _classes(field.annotation)), None)
        if found is None:
            return None
        model = found
    return model


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _classes(inner)


def _meaning(path: str) -> str:
    keys = path.split(".")
    model = _model_at(keys)
    named = [key for key in keys if model and key in model.model_fields]
    if model is None or not named:
        return "described in docs/reference/settings.md"
    field = model.model_fields[named[-1]]
    default = "" if field.is_required() else f" (default {field.get_default(call_default_factory=True)!r})"
    return f"{field.description}{default}"


def _siblings(path: str) -> str:
    model = _model_at(path.split("."))
    return f"The settings here are: {', '.join(model.model_fields)}" if model else "See docs/reference/settings.md"
