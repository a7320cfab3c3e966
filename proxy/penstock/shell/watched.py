"""Files that are looked at again: every few seconds, and at once on SIGHUP."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Reloadable(Protocol):
    async def reload(self) -> None:
        """Takes changed files over if they are right, and says so in the log; raises nothing."""


async def watch(parts: Sequence[Reloadable], seconds: float, look_now: asyncio.Event) -> None:
    """For ever. `look_now` is what SIGHUP sets."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await look_now.wait()
        look_now.clear()
        for part in parts:
            await part.reload()


def fingerprint(path: Path | None) -> tuple[int, int, int] | None:
    """Changes with the file, be it written in place or replaced behind a link as Kubernetes replaces a Secret."""
    try:
        state = path.stat() if path is not None else None
    except OSError:
        return None
    return (state.st_mtime_ns, state.st_size, state.st_ino) if state else None
