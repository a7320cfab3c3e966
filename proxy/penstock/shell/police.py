"""What moderation needs while Penstock runs: the rules in force, the classifiers and the audit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from penstock.settings import Settings
from penstock.shell.audit import Audit
from penstock.shell.moderator import Moderator
from penstock.shell.rulebook import Rulekeeper


@dataclass(frozen=True, slots=True)
class Police:
    rules: Rulekeeper
    moderator: Moderator
    audit: Audit

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings) -> AsyncIterator["Police"]:
        """While the block runs rules are watched and entries written. Raises `SettingsError`."""
        rules = await asyncio.to_thread(Rulekeeper.load, settings.moderation)
        async with Audit.opened(settings.audit) as audit, Moderator.opened(settings.moderation) as moderator:
            watching = asyncio.create_task(rules.watch())
            try:
                yield cls(rules, moderator, audit)
            finally:
                watching.cancel()
