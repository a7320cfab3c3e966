"""Runs the calls that are bound here: over HTTP, or through MCP servers by the official package.

A tool is code of somebody else's that a model steers: every call has a time limit and a bound on what it may answer,
goes only to addresses that may be reached, follows no redirect, and has a key by which the tool can tell a repetition.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import aiohttp
import orjson

from penstock.core.commands import AskAgain, RunTools
from penstock.core.errors import Problem
from penstock.core.request import StreamRequest
from penstock.core.signals import ToolReturned, ToolTried
from penstock.core.wishes import ToolRun
from penstock.shell.engine import read_up_to
from penstock.shell.reach import GuardedResolver, OutOfReach, guarded_sockets
from penstock.shell.sources import Ear, Source
from penstock.tool_settings import Binding, Tools

_log = logging.getLogger("penstock")

Trace = Callable[[ToolRun], contextlib.AbstractContextManager[Mapping[str, str]]]
"""Opens the span of a call; what it gives are the headers that carry the context on."""


class ToolFailed(Exception):
    """The call came to nothing; the text says why. `may_retry` is false where another try cannot help."""

    def __init__(self, why: str, *, may_retry: bool = True) -> None:
        super().__init__(why)
        self.may_retry = may_retry


class Tool(Protocol):
    """Something that a call can be given to."""

    async def call(self, run: ToolRun, headers: Mapping[str, str]) -> str:
        """The answer for the model. Raises `ToolFailed`."""

    async def close(self) -> None: ...


class Toolbox:
    """All bindings of this deployment. Make it inside a running loop; `close` it when the last stream is over."""

    def __init__(self, settings: Tools) -> None:
        self._settings = settings
        self._bound: list[tuple[Binding, Tool]] = [(binding, _made(binding, settings)) for binding in settings.bindings]

    def runs(self, names: frozenset[str]) -> frozenset[str]:
        """Those of the tools that are run here."""
        return frozenset(name for name in names if self._binding(name) is not None)

    async def run(
        self, run: ToolRun, tried: Callable[[int], None], headers: Mapping[str, str]
    ) -> tuple[str, str | None]:
        """What the model is told, and what was wrong, if anything. Tries again only as often as the binding says."""
        found = self._binding(run.name)
        assert found is not None
        binding, tool = found
        for attempt in range(1, binding.retries + 2):
            tried(attempt)
            try:
                async with asyncio.timeout(binding.timeout_seconds):
                    answer = await tool.call(run, headers)
            except TimeoutError:
                problem = f"the tool did not answer within {binding.timeout_seconds:g} s"
                continue
            except ToolFailed as failure:
                problem = str(failure)
                if failure.may_retry:
                    continue
                break
            except Exception:  # a fault of ours, and the stream waits for an answer
                _log.exception("tool %a: internal error", run.name)
                problem = "Penstock failed on this call; its log says more"
                break
            if len(answer.encode()) <= self._settings.loop.result_bytes:
                return answer, None
            problem = f"the tool answered more than {self._settings.loop.result_bytes} bytes (tools.loop.result_bytes)"
            break
        return f"error: {problem}", problem

    async def close(self) -> None:
        for _, tool in self._bound:
            await tool.close()

    def _binding(self, name: str) -> tuple[Binding, Tool] | None:
        fits = (pair for pair in self._bound if any(fnmatchcase(name, pattern) for pattern in pair[0].tools))
        return next(fits, None)


def _made(binding: Binding, settings: Tools) -> Tool:
    if binding.url is not None:
        return HttpTool(binding, settings)
    return McpTool(binding, settings)


# --- HTTP -----------------------------------------------------------------------------------------


class HttpTool:
    """`POST` of the arguments to one URL; the body of the answer is the result."""

    def __init__(self, binding: Binding, settings: Tools) -> None:
        self._binding = binding
        self._most = settings.loop.result_bytes
        allowed = settings.loop.networks
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                resolver=GuardedResolver(allowed),
                socket_factory=guarded_sockets(allowed),
                keepalive_timeout=3,
            ),
            headers={name: value.get_secret_value() for name, value in binding.headers.items()},
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def call(self, run: ToolRun, headers: Mapping[str, str]) -> str:
        url = self._binding.url or ""
        # The caller has named the tool, with line breaks if it liked.
        named = {"Idempotency-Key": run.key, "X-Tool-Name": quote(run.name)}
        merged = {**headers, "Content-Type": "application/json", **named}
        try:
            async with self._session.post(
                url, data=run.arguments.encode(), headers=merged, allow_redirects=False
            ) as answer:
                body = await read_up_to(answer, self._most + 1)  # by which `Toolbox` knows that it is too long
        except OutOfReach as error:
            raise ToolFailed(str(error), may_retry=False) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ToolFailed(f"the tool cannot be reached ({type(error).__name__})") from error
        if not 200 <= answer.status < 300:
            raise ToolFailed(f"the tool answered {answer.status}", may_retry=answer.status >= 500)
        return body.decode("utf-8", "replace")

    async def close(self) -> None:
        await self._session.close()


# --- MCP ------------------------------------------------------------------------------------------


class McpTool:
    """One MCP server, by streamable HTTP or as a process of ours. Its session is opened by the first call.

    One that fails a call, or has not opened when a call's time is up, gets no more of them, since nothing tells whether
    the session is broken: the next call opens another, and those that run in it go on.
    """

    def __init__(self, binding: Binding, settings: Tools) -> None:
        self._binding = binding
        self._allowed = settings.loop.networks
        self._most = settings.loop.result_bytes
        self._session: _McpSession | None = None
        self._living: set[asyncio.Task[None]] = set()

    async def call(self, run: ToolRun, headers: Mapping[str, str]) -> str:
        live = self._session
        if live is None or live.task.done():
            live = self._session = _McpSession(self._connected)
            self._living.add(live.task)
            live.task.add_done_callback(self._living.discard)
        try:
            with live.used():
                session = await asyncio.shield(live.opened)
                meta = {"idempotencyKey": run.key, **headers}
                result = await session.call_tool(run.name, orjson.loads(run.arguments), meta=meta)
        except (asyncio.CancelledError, TimeoutError):
            if not live.has_opened:  # its server may hang: the next call is not to wait for it as well
                self._retire(live)
            raise
        except Exception as error:  # the package's own errors, and those of its transports
            self._retire(live)
            raise self._failure(error, "failed" if live.has_opened else "cannot be reached") from error
        text = "\n".join(getattr(part, "text", None) or f"[{part.type}]" for part in result.content)
        if getattr(result, "is_error", False):
            raise ToolFailed(f"the tool reports an error: {text[:500]}", may_retry=False)
        return text

    async def close(self) -> None:
        if self._session is not None:
            self._retire(self._session)
        if self._living:
            await asyncio.wait(self._living, timeout=5)
        for task in self._living:
            task.cancel()

    def _retire(self, live: "_McpSession") -> None:
        live.retire()
        if self._session is live:
            self._session = None

    def _failure(self, error: Exception, what: str) -> ToolFailed:
        if isinstance(error, ToolFailed):
            return error
        if isinstance(error, OutOfReach):
            return ToolFailed(str(error), may_retry=False)
        return ToolFailed(f"the MCP server {self._binding.label} {what} ({type(error).__name__}: {error})")

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        try:
            from mcp import ClientSession, StdioServerParameters, stdio_client
            from mcp.client.streamable_http import streamable_http_client

            from penstock.shell.mcp_transport import guarded_client
        except ImportError:
            raise ToolFailed("install penstock[mcp] to reach MCP servers", may_retry=False) from None
        binding = self._binding
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(binding.timeout_seconds):
                if binding.mcp is not None:
                    await self._check(binding.mcp)
                    headers = {name: value.get_secret_value() for name, value in binding.headers.items()}
                    client = await stack.enter_async_context(guarded_client(headers, self._allowed, self._most))
                    streams = await stack.enter_async_context(streamable_http_client(binding.mcp, http_client=client))
                else:
                    command, *arguments = binding.command
                    server = StdioServerParameters(
                        command=command, args=arguments, env=dict(binding.environment) or None
                    )
                    streams = await stack.enter_async_context(stdio_client(server))
                session = await stack.enter_async_context(ClientSession(streams[0], streams[1]))
                await session.initialize()
            yield session

    async def _check(self, url: str) -> None:
        """Each request is judged again; this tells of a wrong address in words that the package would lose."""
        parts = urlsplit(url)
        await GuardedResolver(self._allowed).resolve(parts.hostname or "", parts.port or 0)


class _McpSession:
    """A session, which must be left by the task that entered it, so it lives in a task of its own."""

    def __init__(self, connected: Callable[[], contextlib.AbstractAsyncContextManager[Any]]) -> None:
        self._connected = connected
        self._calls = 0
        self._is_retired = False
        self._leave = asyncio.Event()
        self.opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._live())

    @property
    def has_opened(self) -> bool:
        return self.opened.done() and self.opened.exception() is None

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._leave_if_idle()

    def retire(self) -> None:
        """It is left when its calls are over."""
        self._is_retired = True
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if self._is_retired and not self._calls:
            self._leave.set()

    async def _live(self) -> None:
        try:
            async with self._connected() as session:
                self.opened.set_result(session)
                await self._leave.wait()
        except Exception as error:  # one that breaks later fails its calls
            if not self.opened.done():
                self.opened.set_exception(error)
                self.opened.exception()  # whoever waited may have left


# --- The rounds of one stream ---------------------------------------------------------------------


class LoopedAnswer:
    """An answer that goes on after the model's calls were run: one round after the other, each its own request."""

    def __init__(
        self,
        first: Source,
        ask: Callable[[StreamRequest, int], Source],
        toolbox: Toolbox,
        trace: Trace,
        concurrency: int,
    ) -> None:
        self._source = first
        self._ask = ask
        self._toolbox = toolbox
        self._trace = trace
        self._places = asyncio.Semaphore(concurrency)
        self._now = asyncio.get_running_loop().time
        self._turn_is_over = asyncio.Event()
        self._runs: list[ToolRun] = []
        self._next: asyncio.Queue[Source] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    def carry_on(self, command: RunTools | AskAgain) -> None:
        """What the exchange wants next; called while somebody tells it something."""
        if isinstance(command, RunTools):
            self._runs = command.runs
            self._turn_is_over.set()
        else:
            self._next.put_nowait(self._ask(command.request, command.round))

    async def speak(self, ear: Ear) -> None:
        try:
            while not ear.is_over:
                await self._listen(ear)
                if ear.is_over:
                    return
                await self._turn_is_over.wait()  # the engine has said all, and a verdict on it may still be out
                self._turn_is_over.clear()
                # A stream of which another replica knows nothing may be asked for anew, and then the tool is as well.
                await ear.logged()
                if ear.is_over:
                    return
                for run in self._runs:
                    task = asyncio.create_task(self._run(run, ear))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                self._source = await self._next.get()
        finally:
            self._stop_tools()

    def abort(self) -> None:
        self._source.abort()
        self._stop_tools()

    def pause(self) -> None:
        self._source.pause()

    def resume(self) -> None:
        self._source.resume()

    def try_another(self, problem: Problem) -> None:
        self._source.try_another(problem)

    async def is_healthy(self) -> bool:
        return bool(self._tasks) or await self._source.is_healthy()

    def _stop_tools(self) -> None:
        for task in self._tasks:
            if not task.cancelling():  # a second time would cut short how the first is told to an MCP server
                task.cancel()

    async def _listen(self, ear: Ear) -> None:
        """Until the engine's turn is over, however its connection ends; nothing of it is heard after that."""
        speaking = asyncio.create_task(self._source.speak(ear))
        turn = asyncio.create_task(self._turn_is_over.wait())
        try:
            await asyncio.wait({speaking, turn}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            turn.cancel()
            if not speaking.done():
                speaking.cancel()
            await asyncio.gather(speaking, turn, return_exceptions=True)
            self._source.abort()
        if speaking.done() and not speaking.cancelled():
            speaking.result()

    async def _run(self, run: ToolRun, ear: Ear) -> None:
        started = self._now()
        async with self._places:
            with self._trace(run) as headers:
                answer, problem = await self._toolbox.run(
                    run, lambda attempt: ear.hear(ToolTried(run.call_id, run.name, attempt, self._now())), headers
                )
        ear.hear(ToolReturned(run.call_id, run.name, answer, problem, self._now() - started, self._now()))
