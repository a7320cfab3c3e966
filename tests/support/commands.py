"""The `penstock` command as a process of its own."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

PATIENCE_SECONDS = 30.0

# Nothing of this machine's own settings or tracing reaches the command.
_CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "OTEL_", "COVERAGE_"))}


@dataclass(frozen=True)
class Outcome:
    status: int
    output: str
    errors: str


async def penstock(*arguments: str, given: bytes = b"", environment: Mapping[str, str] | None = None) -> Outcome:
    """Runs a command to its end, with `given` as its standard input."""
    process = await _start(arguments, environment)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            output, errors = await process.communicate(given)
    except TimeoutError:
        process.kill()
        raise
    return Outcome(process.returncode or 0, output.decode(), errors.decode())


class Serving:
    """A running `penstock serve` or `penstock replay`."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.url = url
        self._process = process

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def hang_up(self) -> None:
        self._process.send_signal(signal.SIGHUP)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def ended(self) -> Outcome:
        """What it left, once it has ended by itself."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            output, errors = await self._process.communicate()
        return Outcome(self._process.returncode or 0, output.decode(), errors.decode())


@asynccontextmanager
async def serving(*arguments: str, environment: Mapping[str, str] | None = None) -> AsyncIterator[Serving]:
    """A command that listens; it is killed at the end of the block if it still runs."""
    process = await _start(arguments, environment)
    try:
        yield Serving(process, await _announced(process))
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def _start(arguments: tuple[str, ...], environment: Mapping[str, str] | None) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "penstock", *arguments, stdin=pipe, stdout=pipe, stderr=pipe,
        env={**_CLEAN, **(environment or {})},
    )  # fmt: skip


async def _announced(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_SECONDS):
        line = (await process.stdout.readline()).decode()
    found = re.search(r"http://\S+", line)
    if found is None:
        _, errors = await process.communicate()
        raise AssertionError(f"it announced {line!r} and said {errors.decode()}")
    return found.group()
