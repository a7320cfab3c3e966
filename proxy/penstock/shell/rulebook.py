"""The rules of moderation: read from settings, packs and files, compiled, and read again when a file changes."""

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from penstock.core.checksums import CHECKS
from penstock.core.patterns import Pattern, PatternError, regex_pattern, words_pattern
from penstock.core.rules import Policy, Rule, Rulebook
from penstock.moderation_settings import ModerationSettings, PackFile, PackSettings, RuleSettings
from penstock.settings import SettingsError

_log = logging.getLogger("penstock")

_PACKS = resources.files("penstock").joinpath("packs")
_MOST_FILE_BYTES = 4 * 2**20


def shipped_packs() -> list[str]:
    """The names of the packs that come with Penstock."""
    return sorted(path.name.removesuffix(".yaml") for path in _PACKS.iterdir() if path.name.endswith(".yaml"))


def load_rulebook(settings: ModerationSettings) -> Rulebook | None:
    """All rules, compiled; None where there are none. Slow (about 3 s for 500 rules): call it in a thread.

    Raises `SettingsError` naming the rule, what is wrong with it and what to write instead.
    """
    rules = [_build(one, settings, where) for where, one in _all_rules(settings)]
    seen: set[str] = set()
    for rule in rules:
        if rule.id in seen:
            raise SettingsError(f"moderation: two rules are called {rule.id!r}; rename one, or take it `without`")
        seen.add(rule.id)
    return compile_rules(rules) if rules else None


def _all_rules(settings: ModerationSettings) -> Iterator[tuple[str, RuleSettings]]:
    for number, rule in enumerate(settings.rules):
        yield f"moderation.rules.{number}", rule
    for pack in settings.packs:
        for rule in _read_pack(pack.name).rules:
            named = any(fnmatchcase(rule.id, pattern) for pattern in pack.only)
            if named and not any(fnmatchcase(rule.id, pattern) for pattern in pack.without):
                yield f"the pack {pack.name}", rule.model_copy(update=_changes(pack))


def _changes(pack: PackSettings) -> dict[str, Any]:
    names = ("action", "channels", "models", "keys")
    return {name: getattr(pack, name) for name in names if getattr(pack, name) is not None}


def _read_pack(name: str) -> PackFile:
    if "/" not in name and not name.endswith((".yaml", ".yml")):
        if name not in shipped_packs():
            known = ", ".join(shipped_packs())
            raise SettingsError(f"moderation.packs: {name!r} is no pack; there are {known}, or give a YAML file")
        text = _PACKS.joinpath(f"{name}.yaml").read_text("utf-8")
    else:
        text = _read_file(Path(name), "moderation.packs")
    try:
        return PackFile.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise SettingsError(f"moderation.packs: {name} is not YAML: {error}") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise SettingsError(f"moderation.packs: {name} is wrong: {faults}") from None


def _read_file(path: Path, setting: str) -> str:
    try:
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise SettingsError(f"{setting}: {path} is larger than {_MOST_FILE_BYTES} bytes; split it")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error}") from None


def _build(rule: RuleSettings, settings: ModerationSettings, where: str) -> Rule:
    try:
        pattern = _pattern(rule, settings.hold_chars)
    except PatternError as error:
        raise SettingsError(f"{where}: the rule {rule.id!r} {error}") from None
    return Rule(
        id=rule.id,
        action=rule.action,
        category=rule.category,
        pattern=pattern,
        placeholder=rule.placeholder or settings.placeholder,
        channels=frozenset(rule.channels),
        check=CHECKS[rule.check] if rule.check else None,
        models=tuple(rule.models),
        keys=tuple(rule.keys),
    )


def _pattern(rule: RuleSettings, most: int) -> Pattern:
    if rule.regex is not None:
        return regex_pattern(rule.regex, ignore_case=rule.ignore_case is True, most_chars=most)
    ignore_case = rule.ignore_case is not False
    if rule.literal is not None:
        whole_word = rule.whole_word is True
        return words_pattern([rule.literal], ignore_case=ignore_case, whole_word=whole_word, most_chars=most)
    words = rule.words or _words_of(rule.words_file)
    return words_pattern(words, ignore_case=ignore_case, whole_word=rule.whole_word is not False, most_chars=most)


def _words_of(path: Path | None) -> list[str]:
    lines = _read_file(path, "words_file").splitlines() if path is not None else []
    return [word for line in lines if (word := line.partition("#")[0].strip())]


def compile_rules(rules: list[Rule]) -> Rulebook:
    """Raises `SettingsError` where the matching engine is missing or cannot take a rule."""
    try:
        import hyperscan
    except ImportError:
        raise SettingsError(
            "moderation has rules, and the engine that matches them is not installed; "
            "pip install 'penstock[moderation]'"
        ) from None
    flags = hyperscan.HS_FLAG_UTF8
    forward = _Expressions(flags | hyperscan.HS_FLAG_SINGLEMATCH)
    backward = _Expressions(flags | hyperscan.HS_FLAG_ALLOWEMPTY)
    for place, rule in enumerate(rules):
        caseless = hyperscan.HS_FLAG_CASELESS if rule.pattern.ignore_case else 0
        forward.add(rule.pattern.forward, place, caseless)
        backward.add(rule.pattern.backward, place, caseless)
    return Rulebook(tuple(rules), forward.compile(), backward.compile(), _digest(rules))


def _digest(rules: list[Rule]) -> str:
    """Names a set of rules in the audit: another one wherever anything of a rule is different."""
    told = [
        (
            rule.id, rule.action, rule.category, rule.placeholder, sorted(rule.channels), rule.models, rule.keys,
            rule.check.__name__ if rule.check else None, rule.pattern.forward, rule.pattern.ignore_case,
            [reading.expression.pattern for reading in rule.pattern.readings],
        )
        for rule in rules
    ]  # fmt: skip
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


class _Expressions:
    """What goes into one database; several expressions may report the same rule."""

    def __init__(self, flags: int) -> None:
        self._common = flags
        self._expressions: list[bytes] = []
        self._places: list[int] = []
        self._flags: list[int] = []

    def add(self, expressions: tuple[str, ...], place: int, flags: int) -> None:
        for expression in expressions:
            self._expressions.append(expression.encode("utf-8"))
            self._places.append(place)
            self._flags.append(self._common | flags)

    def compile(self) -> Any:
        import hyperscan

        if not self._expressions:  # rules of one character each have no beginnings
            self.add(("^\\x00\\x01\\x00",), 0, 0)
        database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
        try:
            database.compile(
                expressions=self._expressions, ids=self._places, elements=len(self._expressions), flags=self._flags
            )
        except hyperscan.error as error:
            raise SettingsError(f"moderation: a rule is too large for the matching engine: {error}") from None
        return database


class Rulekeeper:
    """The rules in force. A new rulebook replaces the old one for streams that begin; open ones keep theirs."""

    def __init__(self, settings: ModerationSettings, rulebook: Rulebook | None) -> None:
        self._settings = settings
        self._seen = self._fingerprint()
        self.rulebook = rulebook

    @classmethod
    def load(cls, settings: ModerationSettings) -> "Rulekeeper":
        """Slow, for a thread. Raises `SettingsError`."""
        return cls(settings, load_rulebook(settings))

    def choose(self, model: str, key: str) -> Policy | None:
        """The rules for one stream, None where none apply."""
        return self.rulebook.choose(model, key) if self.rulebook is not None else None

    async def watch(self) -> None:
        """For ever: reads the rules again when one of their files has changed."""
        while True:
            await asyncio.sleep(self._settings.reload_seconds)
            await self.reload()

    async def reload(self) -> None:
        """Takes the rules over if a file changed and all are right; a wrong file changes nothing."""
        seen = await asyncio.to_thread(self._fingerprint)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.rulebook = await asyncio.to_thread(load_rulebook, self._settings)
        except Exception as error:  # whatever is wrong with a file, the rules in force are kept and watched on
            _log.error("the moderation rules in force stay as they were: %s", error)
        else:
            _log.info("the moderation rules were read again: %s", self.rulebook.digest if self.rulebook else "none")

    def _fingerprint(self) -> tuple[tuple[str, int, int, int], ...]:
        """Of the files of packs and words, those that a pack's file names included."""
        packs = [Path(pack.name) for pack in self._settings.packs if pack.name not in shipped_packs()]
        marks = []
        for path in [*packs, *sorted(_word_files(self._settings))]:
            try:
                state = path.stat()
            except OSError:
                continue
            marks.append((str(path), state.st_mtime_ns, state.st_size, state.st_ino))
        return tuple(marks)


def _word_files(settings: ModerationSettings) -> set[Path]:
    rules = list(settings.rules)
    for pack in settings.packs:
        if pack.name in shipped_packs():
            continue
        try:
            rules += _read_pack(pack.name).rules
        except SettingsError:
            continue  # the file itself is watched
    return {rule.words_file for rule in rules if rule.words_file is not None}
