"""Rules for tests, compiled once, and a model of what they must do that shares no code with Penstock."""

import json
from functools import lru_cache
from typing import Any

from penstock.core.rules import Policy, Rulebook
from penstock.moderation_settings import ModerationSettings
from penstock.shell.rulebook import load_rulebook

Json = dict[str, Any]


@lru_cache
def _load(settings: str) -> Rulebook:
    book = load_rulebook(ModerationSettings.model_validate_json(settings))
    assert book is not None
    return book


def rulebook(*rules: Json, **settings: Any) -> Rulebook:
    """A rulebook of these rules, as they would stand under `moderation.rules`."""
    return _load(json.dumps({"rules": rules, **settings}, sort_keys=True))


def policy(*rules: Json, model: str = "tiny", key: str = "anonymous", **settings: Any) -> Policy:
    chosen = rulebook(*rules, **settings).choose(model, key)
    assert chosen is not None
    return chosen
