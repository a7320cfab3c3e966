"""Settings of tools and of notes beside the text: who may call what, how calls go out, what is run here."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Literal
from urllib.parse import urlsplit

import regex
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from penstock.core.citations import CitationPattern
from penstock.core.schemas import SchemaError, schema_of
from penstock.core.tool_policy import ToolRule
from penstock.core.wishes import ToolRelease


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ToolPolicyRule(_Part):
    """The first rule that names the caller and the tool decides; a call that no rule names is allowed."""

    id: str = Field(min_length=1, description="what events and messages call it")
    tools: list[str] = Field(["*"], description="shell patterns of tool names")
    keys: list[str] = Field(["*"], description="shell patterns of key names; `anonymous` where there are no keys")
    action: Literal["allow", "deny"] = Field("allow", description="what becomes of such calls")
    reason: str = Field("", description="a sentence for people, told with a denied call")
    calls: int | None = Field(None, ge=0, description="calls in one stream; further ones are denied")
    arguments_bytes: int | None = Field(None, ge=1, description="longest arguments, in UTF-8 bytes")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="a JSON Schema that the arguments must fit beside the request's own"
    )

    @field_validator("arguments")
    @classmethod
    def _is_a_schema(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            schema_of(value)
        except SchemaError as error:
            raise ValueError(f"is no JSON Schema, {error}") from None
        return value

    def made(self) -> ToolRule:
        return ToolRule(
            self.id,
            tuple(self.tools),
            self.action == "allow",
            self.reason,
            self.calls,
            self.arguments_bytes,
            schema_of(self.arguments) if self.arguments else None,
        )


class Binding(_Part):
    """Where calls of a tool are run: `url`, or an MCP server by `mcp` (streamable HTTP) or `command` (a process)."""

    tools: list[str] = Field(min_length=1, description="shell patterns of tool names")
    url: str | None = Field(None, description="the arguments are posted here; the answer is the result")
    mcp: str | None = Field(None, description="URL of an MCP server (streamable HTTP); needs penstock[mcp]")
    command: list[str] = Field(default_factory=list, description="an MCP server as a process (stdio) and its arguments")
    headers: dict[str, SecretStr] = Field(default_factory=dict, description="sent with each call over HTTP")
    environment: dict[str, str] = Field(default_factory=dict, description="of the process")
    timeout_seconds: float = Field(30, gt=0, description="time for one try of a call")
    retries: int = Field(
        0, ge=0, description="further tries of a failed call; for tools that know repetitions by their key"
    )

    @model_validator(mode="after")
    def _one_place(self) -> "Binding":
        if sum(map(bool, (self.url, self.mcp, self.command))) != 1:
            raise ValueError("give exactly one of url, mcp and command")
        for url in (self.url, self.mcp):
            if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
                raise ValueError(f"{url!r} must be a URL like https://tools.example.com/search")
        return self

    @property
    def label(self) -> str:
        return urlsplit(self.mcp).netloc if self.mcp else self.command[0] if self.command else ""


class Loop(_Part):
    rounds: int = Field(8, ge=1, description="turns of calls in one stream; after the last the model must answer")
    concurrency: int = Field(4, ge=1, description="calls of one stream that run at the same time")
    result_bytes: int = Field(64 * 2**10, ge=1, description="longest result of a call")
    show_results: bool = Field(False, description="tell clients the results, not only that there are some")
    allow_networks: list[str] = Field(
        default_factory=list, description="networks of tools that are not public, such as 10.0.0.0/8"
    )

    @field_validator("allow_networks")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        for network in value:
            ip_network(network)
        return value

    @property
    def networks(self) -> list[IPv4Network | IPv6Network]:
        return [ip_network(network) for network in self.allow_networks]


class Tools(_Part):
    release: ToolRelease = Field(
        "stream",
        description="in dialects without a word for ready: `stream` fragments as they come, or each call once it is "
        "valid, `ready`",
    )
    policy: list[ToolPolicyRule] = Field(default_factory=list, description="who may call what")
    bindings: list[Binding] = Field(
        default_factory=list, description="tools that Penstock runs itself; none by default"
    )
    loop: Loop = Field(Loop(), description="bounds on what is run")

    def rules_for(self, principal: str) -> Sequence[ToolRule]:
        return [rule.made() for rule in self.policy if any(fnmatchcase(principal, key) for key in rule.keys)]


class Citation(_Part):
    open: str = Field(min_length=1, max_length=64, description="what a marker begins with, such as `[`")
    close: str = Field(min_length=1, max_length=64, description="what it ends with")
    body: str = Field(
        r"[^\[\]]+", description="regular expression for all that stands between; named groups go into the data"
    )
    kind: str = Field("citation", min_length=1, max_length=64, description="`kind` of the annotation")
    keep: bool = Field(False, description="leave the marker in the text")
    longest: int = Field(256, ge=2, le=4096, description="most characters of a marker; as many may be held")

    @field_validator("body")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        try:
            regex.compile(value)
        except (regex.error, re.error) as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value


class Annotations(_Part):
    citations: list[Citation] = Field(default_factory=list, description="markers in the answer that become annotations")
    note_bytes: int = Field(64 * 2**10, ge=256, description="largest annotation that a backend may add")
    notes_per_stream: int = Field(256, ge=1, description="annotations that backends may add to one stream")

    @model_validator(mode="after")
    def _are_told_apart(self) -> "Annotations":
        openings = [citation.open for citation in self.citations]
        for one in openings:
            if openings.count(one) > 1 or any(one in other[:-1] for other in openings if other != one):
                raise ValueError(f"citations: {one!r} stands twice or within another opening")
        return self

    @property
    def patterns(self) -> tuple[CitationPattern, ...]:
        return tuple(CitationPattern(c.open, c.close, c.body, c.kind, c.keep, c.longest) for c in self.citations)
