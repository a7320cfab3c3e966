"""The settings of moderation and its audit: a part of `settings.py`, which explains the whole."""

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from penstock.access_settings import UsageFile
from penstock.core.checksums import CHECKS
from penstock.core.rules import Action, RuleChannel

_CHANNELS: list[RuleChannel] = ["answer", "reasoning", "tools"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RuleSettings(_Part):
    """One rule: `id`, exactly one of `literal`, `words`, `words_file` and `regex`, and what happens at a match."""

    id: str = Field(pattern=r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}", description="its name in events, audit and metrics")
    literal: str | None = Field(None, min_length=1, description="this text, anywhere")
    words: list[str] | None = Field(None, min_length=1, description="any of these, as whole words")
    words_file: Path | None = Field(None, description="a file of words, a line each; # begins a comment")
    regex: str | None = Field(None, min_length=1, description="a regular expression that matches a bounded length")
    action: Action = Field("redact", description="redact, halt or flag")
    category: str = Field("custom", min_length=1, max_length=64, description="told beside the rule's name")
    placeholder: str | None = Field(None, min_length=1, description="stands for what is redacted")
    ignore_case: bool | None = Field(None, description="true for literal and words, false for regex, unless said")
    whole_word: bool | None = Field(None, description="true for words, false for literal, unless said")
    check: str | None = Field(None, description=f"a match counts only if this holds: {', '.join(CHECKS)}")
    channels: list[RuleChannel] = Field(_CHANNELS, min_length=1, description="answer, reasoning, tools")
    models: list[str] = Field(default_factory=list, description="shell patterns of models; none means all")
    keys: list[str] = Field(default_factory=list, description="shell patterns of key names; none means all")

    @model_validator(mode="after")
    def _one_kind(self) -> "RuleSettings":
        kinds = ("literal", "words", "words_file", "regex")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(kinds)}; it has {', '.join(given) or 'none'}")
        if self.check is not None and self.check not in CHECKS:
            raise ValueError(f"check {self.check!r} is none of {', '.join(CHECKS)}")
        if self.regex is not None and self.whole_word is not None:
            raise ValueError(r"whole_word is for literals; write \b at the ends of a regex")
        return self


class PackSettings(_Part):
    """A pack of rules by name or file, and what is different here from what it says."""

    name: str = Field(min_length=1, description="a shipped pack, or a YAML file with `rules`")
    only: list[str] = Field(["*"], min_length=1, description="shell patterns of the rules that are taken")
    without: list[str] = Field(default_factory=list, description="shell patterns of the rules that are not")
    action: Action | None = Field(None, description="instead of each rule's own")
    channels: list[RuleChannel] | None = Field(None, min_length=1, description="instead of each rule's own")
    models: list[str] | None = Field(None, description="instead of each rule's own")
    keys: list[str] | None = Field(None, description="instead of each rule's own")

    @model_validator(mode="before")
    @classmethod
    def _from_a_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class PackFile(_Part):
    """What a pack's file holds."""

    description: str = ""
    rules: list[RuleSettings] = Field(min_length=1)


class ClassifierSettings(_Part):
    """A service that judges windows of text, beside the stream (async) or before it goes out (gate)."""

    url: str = Field(
        pattern=r"https?://.+", description="where windows are posted, e.g. http://guard:8000/v1/moderations"
    )
    name: str = Field("", max_length=64, description="its name in events and audit; its host by default")
    shape: Literal["openai", "guard"] = Field(
        "openai", description="openai: the moderations API; guard: a guard model on a vLLM's chat route"
    )
    model: str = Field("", description="the model that is asked; a guard needs one")
    api_key: SecretStr | None = Field(None, description="sent as bearer token")
    mode: Literal["async", "gate"] = Field("async", description="async never holds text; gate holds it for the verdict")
    on_failure: Literal["open", "closed"] = Field(
        "open", description="down, slow or nonsense: open lets the text go, closed ends the stream"
    )
    timeout_ms: float = Field(1000, gt=0, description="time for one verdict, waiting for a turn included")
    concurrency: int = Field(64, ge=1, description="questions at once; others wait for a turn")
    channels: list[RuleChannel] = Field(_CHANNELS, min_length=1, description="answer, reasoning, tools")

    @model_validator(mode="after")
    def _guards_have_a_model(self) -> "ClassifierSettings":
        if self.shape == "guard" and not self.model:
            raise ValueError("a guard on a chat route needs `model`")
        return self

    @property
    def label(self) -> str:
        return self.name or urlsplit(self.url).netloc


class WindowSettings(_Part):
    """What classifiers are shown."""

    chars: int = Field(240, ge=1, description="new characters of a channel after which they are asked")
    overlap_chars: int = Field(80, ge=0, description="characters of the last window that are shown again")
    ms: float = Field(150, gt=0, description="time after which they are asked about less")
    gate_chars: int = Field(8192, ge=1, description="characters a gate holds; over it they count as not judged")


class AuditFile(UsageFile):
    path: Path = Field(description="one line of JSON for each entry; opened anew for every write")
    days: int | None = Field(None, ge=1, description="rotated files older than this are removed; then a file is a day")


class AuditSettings(_Part):
    """What is written down about interventions."""

    file: AuditFile | None = Field(None, description="entries as lines of JSON")
    otlp: bool = Field(False, description="entries as OTLP logs, to where OTEL_EXPORTER_OTLP_* says")
    text: Literal["digest", "masked", "plain"] = Field(
        "digest", description="of what matched: a digest alone, its shape too (x and 9), or its text too"
    )
    key: SecretStr | None = Field(None, min_length=16, description="key of the digests; if none, drawn at every start")
    sample: float = Field(0, ge=0, le=1, description="share of streams without an intervention that get an entry")


class ModerationSettings(_Part):
    packs: list[PackSettings] = Field(
        default_factory=list, description="packs of rules: pii, secrets, profanity, or a YAML file of your own"
    )
    rules: list[RuleSettings] = Field(default_factory=list, description="rules of this deployment")
    classifiers: list[ClassifierSettings] = Field(
        default_factory=list, max_length=16, description="services that judge windows of the text"
    )
    window: WindowSettings = Field(WindowSettings(), description="what classifiers are shown")
    placeholder: str = Field("[redacted]", min_length=1, description="stands for what a rule without its own redacts")
    hold_chars: int = Field(
        4096, ge=16, le=65536, description="characters of a field that may be held; no rule may match more"
    )
    reload_seconds: float = Field(5, gt=0, description="how often the files of packs and words are looked at")
