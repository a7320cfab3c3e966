"""CPU microseconds per token of vLLM's front end: its API server process alone, and together with the sidecar.

One real engine (`examples/tiny_vllm`) serves all ways, which take turns within one run: OpenAI chat streams straight
from vLLM, and through Penstock from tagged tokens and from plain chunks. Counted are the process that serves HTTP
and the sidecar's process, never the engine core nor the clients. Every token is checked to have arrived. At last
engines with and without the plugin take turns, to see what it costs where nobody uses it.
It prints a table and a line of JSON for each turn.
"""

import argparse
import asyncio
import bisect
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.cpu_per_token import _PIECE as PIECE  # noqa: E402
from bench.cpu_per_token import (  # noqa: E402
    ANSWER,
    CHAT,
    STREAMS,
    THOUGHT,
    LostTokensError,
    Reader,
    Transcript,
    busy_seconds,
    free_port,
    print_line,
    process_cpu_seconds,
    running,
)

from support.engine import Engine, running_engine, running_engines  # noqa: E402

# Room for 256 streams at once, in the batch, in one step's prompts and in the KV cache.
ENGINE_ARGUMENTS: Final = (
    *("--max-num-seqs", "256", "--max-num-batched-tokens", "65536"),
    *("--num-gpu-blocks-override", "8192"),
)
WITH_PLUGIN: Final = {"VLLM_PLUGINS": "penstock"}
WITHOUT_PLUGIN: Final = {"VLLM_PLUGINS": ""}

# The engine sleeps so long before the first token of a turn, so that all of its streams are open by then.
START_MS: Final = 400
START_MS_A_STREAM: Final = 8
# Streams run so long before the steady part begins, and a little longer than it lasts.
SETTLE_SECONDS: Final = 0.5
TAIL_SECONDS: Final = 1.0
FIRST_EVENTS: Final = 5
FIRST_TOKENS: Final = 16
TURN_SECONDS: Final = 120.0
PLUGIN_SECONDS: Final = 30.0
FLAT_TOKENS: Final = 400
# A turn of the idle plugin is short, so that many take turns: streams of a load, flat out or a step every 30 ms.
IDLE_LOADS: Final = ("64", "flat")
IDLE_FLAT_TOKENS: Final = 250

TOOL: Final = {
    "type": "function",
    "function": {
        "name": "river_level",
        "description": "The level of a river in metres",
        "parameters": {"type": "object", "properties": {"river": {"type": "string"}}, "required": ["river"]},
    },
}


# -- what is streamed ----------------------------------------------------------------------------------


class Script:
    """What the model says in `tokens` tokens: a quarter thought, the rest answer, and the end token."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        thought = _said(engine, THOUGHT, tokens // 4)
        answer = _said(engine, ANSWER, tokens - tokens // 4 - 5)
        self._pieces = [("<think>", 1), ("\n", 1), *thought, ("</think>", 1), ("\n\n", 1), *answer]
        self.ids = engine.script("".join(text for text, _ in self._pieces))

    def lengths(self, *, raw: bool) -> list[int]:
        """Characters of text after each token: `raw` with the markers, else without."""
        sizes: list[int] = []
        for text, tokens in self._pieces:
            is_marker = text in ("<think>", "</think>")
            sizes += [0] * (tokens - 1) + [0 if is_marker and not raw else len(text)]
        return list(itertools.accumulate(sizes))

    def visible(self, *, raw: bool) -> str:
        """All of the text without white space, which vLLM's parsers strip in places."""
        text = "".join(text for text, _ in self._pieces)
        return squeezed(text if raw else text.replace("<think>", "").replace("</think>", ""))


def _said(engine: Engine, text: str, tokens: int) -> list[tuple[str, int]]:
    """Pieces of `text`, over and over, with the tokens of each: `tokens` of them together, or a few less."""
    pieces: list[tuple[str, int]] = []
    for piece in itertools.cycle(PIECE.findall(text)):
        count = len(engine.tokens.encode(piece))
        tokens -= count
        if tokens < 0:
            return pieces
        pieces.append((piece, count))
    raise AssertionError("a cycle has no end")


def squeezed(text: str) -> str:
    return "".join(text.split())


@dataclass(frozen=True)
class Load:
    """`streams` at once, an engine step every `pause_ms` (0: as fast as the engine can)."""

    streams: int
    pause_ms: int
    tokens: int
    steady_seconds: float

    @property
    def start_ms(self) -> int:
        return START_MS + START_MS_A_STREAM * self.streams

    @property
    def name(self) -> str:
        pace = f"{self.pause_ms} ms steps" if self.pause_ms else "flat out"
        return f"{self.streams} streams, {pace}"


def load_of(streams: int, pause_ms: int, seconds: float, flat_tokens: int = FLAT_TOKENS) -> Load:
    lasting = int((SETTLE_SECONDS + seconds + TAIL_SECONDS) * 1000)
    tokens = FIRST_TOKENS + lasting // pause_ms if pause_ms else flat_tokens
    return Load(streams, pause_ms, tokens, seconds)


# -- the ways to a client ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to a client, and the processes that it costs: vLLM's API server and perhaps a sidecar."""

    name: str
    port: int
    route: str
    model: str
    api_pid: int
    sidecar_pid: int | None = None

    @property
    def is_raw(self) -> bool:
        return self.sidecar_pid is None and self.model == Engine.model


def api_server_pid(engine: Engine) -> int:
    """The process that serves HTTP: our own child that was started with the engine's port."""
    port = engine.url.rpartition(":")[2]
    for children in Path("/proc/self/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            arguments = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            if port in arguments and any(argument.endswith("serve.py") for argument in arguments):
                return child
    raise SystemExit(f"no process of ours serves {engine.url}")


def direct(engine: Engine) -> list[Way]:
    pid, port = api_server_pid(engine), int(engine.url.rpartition(":")[2])
    return [
        Way("vLLM alone, its parsers", port, CHAT, Engine.parsed_model, pid),
        Way("vLLM alone, no parsers", port, CHAT, Engine.model, pid),
    ]


def penstock(stack: ExitStack, engine_url: str, plugin: str, source: Path | None = None) -> tuple[int, int]:
    """A sidecar's port and process; it looks for the plugin in the background, where `plugin` is auto.

    `source` is the `proxy` directory of another checkout.
    """
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    settings = directory / "penstock.yaml"
    settings.write_text(json.dumps({"upstreams": [{"url": engine_url, "plugin": plugin, "parses_tools": False}]}))
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PENSTOCK_"))}
    if source is not None:
        environment["PYTHONPATH"] = str(source.resolve(strict=True))
    command: list[str | Path] = [sys.executable, "-m", "penstock", "serve", "--port", str(port)]
    command += ["--config", settings]
    return port, stack.enter_context(running(command, port, environment)).pid


def through_penstock(stack: ExitStack, engine: Engine, beside: dict[str, Path]) -> list[Way]:
    api = api_server_pid(engine)
    tagged, tagged_pid = penstock(stack, engine.url, "auto")
    plain, plain_pid = penstock(stack, engine.url, "off")
    others = {name: penstock(stack, engine.url, "auto", source) for name, source in beside.items()}
    return [
        Way("tagged tokens, /v1/streams", tagged, STREAMS, Engine.model, api, tagged_pid),
        Way("tagged tokens, chat completions", tagged, CHAT, Engine.model, api, tagged_pid),
        Way("plain chunks, /v1/streams", plain, STREAMS, Engine.model, api, plain_pid),
        *(
            Way(f"tagged tokens, chat, {name}", port, CHAT, Engine.model, api, pid)
            for name, (port, pid) in others.items()
        ),
    ]


def open_tagged_streams(engine: Engine) -> int:
    with urlopen(f"{engine.url}/v1/penstock/capabilities", timeout=10) as answer:
        count: int = json.load(answer)["open_streams"]
    return count


class Meter(asyncio.Protocol):
    """One connection of a sidecar, passed on to the engine; counts what the engine sends on all of them."""

    received = 0

    def __init__(self, engine_port: int) -> None:
        self._engine_port = engine_port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.pause_reading()
        self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._engine, _ = await loop.create_connection(
            lambda: _Counted(self._transport), "127.0.0.1", self._engine_port
        )
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._engine.write(data)

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._connecting.done():
            self._engine.close()


class _Counted(asyncio.Protocol):
    """The engine's side of such a connection."""

    def __init__(self, sidecar: asyncio.Transport) -> None:
        self._sidecar = sidecar

    def data_received(self, data: bytes) -> None:
        Meter.received += len(data)
        self._sidecar.write(data)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._sidecar.close()


# -- a turn --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """The steady part of one turn: CPU of both processes, tokens and bytes that the clients got, wall time.

    `others` is how many cores were busy with what is no part of this: noise, and the engine core itself.
    """

    api_seconds: float
    sidecar_seconds: float
    tokens: int
    bytes: int
    seconds: float
    others: float
    metered_bytes: int

    @property
    def microseconds(self) -> float:
        return (self.api_seconds + self.sidecar_seconds) / self.tokens * 1e6

    @property
    def api_microseconds(self) -> float:
        return self.api_seconds / self.tokens * 1e6

    @property
    def sidecar_microseconds(self) -> float:
        return self.sidecar_seconds / self.tokens * 1e6


@dataclass(frozen=True)
class _Mark:
    time: float
    api: float
    sidecar: float
    others: float
    sizes: list[int]
    metered: int

    @classmethod
    def now(cls, way: Way, readers: list[Reader]) -> "_Mark":
        api = process_cpu_seconds(way.api_pid)
        sidecar = process_cpu_seconds(way.sidecar_pid) if way.sidecar_pid is not None else 0.0
        others = busy_seconds() - api - sidecar - time.process_time()
        sizes = [reader.size for reader in readers]
        return cls(time.monotonic(), api, sidecar, others, sizes, Meter.received)


def request_bytes(way: Way, load: Load, script: Script) -> bytes:
    body: dict[str, Any] = {
        "model": way.model,
        "messages": [{"role": "user", "content": "How is a turbine fed?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": len(script.ids),
        "vllm_xargs": {"script": script.ids, "script_pause_ms": load.pause_ms, "script_start_ms": load.start_ms},
    }
    if not way.is_raw:
        body["tools"] = [TOOL]
    data = json.dumps(body).encode()
    head = f"POST {way.route} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\naccept: text/event-stream\r\n"
    return head.encode() + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


async def take_turn(way: Way, load: Load, script: Script) -> Turn:
    request = request_bytes(way, load, script)
    try:
        async with asyncio.timeout(TURN_SECONDS):
            readers = await _open(request, way.port, load.streams)
            await _speaking(readers)
            if load.pause_ms:
                await asyncio.sleep(SETTLE_SECONDS)
            before = _Mark.now(way, readers)
            await _end_steady_part(load, readers)
            after = _Mark.now(way, readers)
            await asyncio.wait({reader.closed for reader in readers})
        return _turn(way, script, readers, before, after)
    except (TimeoutError, ValueError, LostTokensError) as error:
        raise SystemExit(f"{way.name}, {load.name}: {error!r}") from error


async def _open(request: bytes, port: int, streams: int) -> list[Reader]:
    loop = asyncio.get_running_loop()
    opened = [await loop.create_connection(lambda: Reader(request), "127.0.0.1", port) for _ in range(streams)]
    return [reader for _, reader in opened]


async def _speaking(readers: list[Reader]) -> None:
    """Until every stream has brought some tokens: its head, which comes at once, its role and one token are less."""
    silent = readers
    while True:
        silent = [r for r in silent if not r.closed.done() and b"".join(r.received).count(b"data: ") < FIRST_EVENTS]
        if not silent:
            return
        await asyncio.sleep(0.03)


async def _end_steady_part(load: Load, readers: list[Reader]) -> None:
    """After its time where the streams are paced, else when all of them are over."""
    closed = {reader.closed for reader in readers}
    if not load.pause_ms:
        await asyncio.wait(closed)
        return
    done, _ = await asyncio.wait(closed, timeout=load.steady_seconds, return_when=asyncio.FIRST_COMPLETED)
    if done:
        raise LostTokensError("a stream ended within the steady part")


def _turn(way: Way, script: Script, readers: list[Reader], before: _Mark, after: _Mark) -> Turn:
    """Raises `LostTokensError` unless every reader got the whole script."""
    expected, lengths = script.visible(raw=way.is_raw), script.lengths(raw=way.is_raw)
    tokens = 0
    for reader, start, end in zip(readers, before.sizes, after.sizes, strict=True):
        transcript = Transcript(reader.received)
        if squeezed(transcript.text) != expected:
            raise LostTokensError(f"got {transcript.text[:200]!r}… which is not what the model said")
        # From the end: what the parsers strip is before the answer.
        surplus = lengths[-1] - len(transcript.text)
        first, last = (bisect.bisect_right(lengths, transcript.length_at(m) + surplus) for m in (start, end))
        tokens += last - first
    if not tokens:
        raise LostTokensError("no token came in the steady part: the machine is too busy to measure anything")
    seconds = after.time - before.time
    return Turn(
        after.api - before.api,
        after.sidecar - before.sidecar,
        tokens,
        sum(after.sizes) - sum(before.sizes),
        seconds,
        (after.others - before.others) / seconds,
        after.metered - before.metered,
    )


# -- the figures ---------------------------------------------------------------------------------------

Figures = dict[tuple[str, str], list[Turn]]


async def measure(engine: Engine, ways: list[Way], loads: list[Load], rounds: int, **fields: Any) -> Figures:
    """Takes turns: every way once per load and round, so that noise falls on all alike."""
    scripts = {load: Script(engine, load.tokens) for load in loads}
    figures: Figures = {}
    for number, load, way in itertools.product(range(1, rounds + 1), loads, ways):
        turn = await take_turn(way, load, scripts[load])
        figures.setdefault((load.name, way.name), []).append(turn)
        print_line(
            **fields,
            turn=number,
            load=load.name,
            way=way.name,
            microseconds_per_token=round(turn.microseconds, 1),
            api=round(turn.api_microseconds, 1),
            sidecar=round(turn.sidecar_microseconds, 1),
            tokens=turn.tokens,
            tokens_per_second=round(turn.tokens / turn.seconds),
            client_bytes_per_token=round(turn.bytes / turn.tokens, 1),
            cores_busy_otherwise=round(turn.others, 2),
        )
    return figures


async def warm_up(engine: Engine, ways: list[Way]) -> None:
    """Every way once; one that is named after tagged tokens must really read them."""
    load = load_of(4, 30, 1.0)
    script = Script(engine, load.tokens)
    deadline = time.monotonic() + PLUGIN_SECONDS
    for way in ways:
        while True:
            turn = asyncio.create_task(take_turn(way, load, script))
            await asyncio.sleep(1.5)
            tagged = await asyncio.to_thread(open_tagged_streams, engine)
            await turn
            if bool(tagged) == way.name.startswith("tagged"):
                break
            if time.monotonic() > deadline:
                raise SystemExit(f"{way.name}: {tagged} tagged streams are open in the engine")


async def meter_bytes(engine: Engine, seconds: float) -> dict[str, float]:
    """Bytes per token from the engine to a sidecar, by way."""
    engine_port = int(engine.url.rpartition(":")[2])
    server = await asyncio.get_running_loop().create_server(lambda: Meter(engine_port), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    found: dict[str, float] = {}
    load = load_of(64, 30, seconds)
    script = Script(engine, load.tokens)
    for name, plugin in (("tagged tokens", "auto"), ("plain chunks", "off")):
        with ExitStack() as stack:
            port, pid = await asyncio.to_thread(penstock, stack, url, plugin)
            way = Way(name, port, STREAMS, Engine.model, api_server_pid(engine), pid)
            await warm_up(engine, [way])
            turn = await take_turn(way, load, script)
        found[name] = turn.metered_bytes / turn.tokens
        print_line(load=load.name, way=name, engine_bytes_per_token=round(found[name], 1))
    server.close()
    return found


def measure_ways(arguments: argparse.Namespace) -> None:
    loads = [load_of(*LOADS[name], arguments.seconds) for name in arguments.loads]
    beside = {name: Path(source) for name, _, source in (other.partition("=") for other in arguments.beside)}

    async def run(engine: Engine, ways: list[Way]) -> tuple[Figures, dict[str, float]]:
        await warm_up(engine, ways)
        figures = await measure(engine, ways, loads, arguments.rounds)
        return figures, await meter_bytes(engine, arguments.seconds)

    with running_engine(*ENGINE_ARGUMENTS, environment=WITH_PLUGIN) as engine, ExitStack() as stack:
        ways = [*direct(engine), *through_penstock(stack, engine, beside)]
        figures, metered = asyncio.run(run(engine, ways))
    for load in loads:
        print_table(load, {way.name: figures[load.name, way.name] for way in ways}, metered)


def print_table(load: Load, figures: dict[str, list[Turn]], metered: dict[str, float]) -> None:
    """A row a way. The ratios are medians of the ratios within each round."""
    parsed, raw = list(figures.values())[:2]
    print(f"\n{load.name}: CPU microseconds per token, {len(parsed)} turns each")
    print(
        f"{'':32}{'median':>8}{'min':>8}{'max':>8}{'API':>8}{'sidecar':>8}{'/ parsers':>10}{'/ none':>8}"
        f"{'client B':>10}{'engine B':>10}{'tokens/s':>10}"
    )
    for name, turns in figures.items():
        costs = [turn.microseconds for turn in turns]
        engine_bytes = next((f"{value:.1f}" for way, value in metered.items() if name.startswith(way)), "")
        row = {
            "median": statistics.median(costs),
            "min": min(costs),
            "max": max(costs),
            "api": statistics.median(turn.api_microseconds for turn in turns),
            "sidecar": statistics.median(turn.sidecar_microseconds for turn in turns),
            "of_parsers": _ratio(turns, parsed),
            "of_none": _ratio(turns, raw),
            "client_bytes": statistics.median(turn.bytes / turn.tokens for turn in turns),
            "tokens_per_second": statistics.median(turn.tokens / turn.seconds for turn in turns),
        }
        print(
            f"{name:32}{row['median']:8.1f}{row['min']:8.1f}{row['max']:8.1f}{row['api']:8.1f}{row['sidecar']:8.1f}"
            f"{row['of_parsers']:10.2f}{row['of_none']:8.2f}{row['client_bytes']:10.1f}{engine_bytes:>10}"
            f"{row['tokens_per_second']:10.0f}"
        )
        print_line(load=load.name, way=name, **{key: round(value, 2) for key, value in row.items()})


def _ratio(turns: Iterable[Turn], others: Iterable[Turn]) -> float:
    return statistics.median(a.microseconds / b.microseconds for a, b in zip(turns, others, strict=True))


# -- installed and not used ----------------------------------------------------------------------------


IDLE: Final = {"without": WITHOUT_PLUGIN, "with": WITH_PLUGIN, "without again": WITHOUT_PLUGIN}


def measure_idle(arguments: argparse.Namespace) -> None:
    """vLLM's own routes with the plugin and without it, and without it once more: what no cause at all looks like.

    All three run at once and take turns of seconds, so that what else the machine does falls on all. Engines of one
    kind differ too, so there are new ones in each round.
    """
    loads = [load_of(*LOADS[name], arguments.seconds, flat_tokens=IDLE_FLAT_TOKENS) for name in IDLE_LOADS]
    rounds: list[dict[str, Figures]] = []
    for number in range(1, arguments.idle_rounds + 1):
        with running_engines(*ENGINE_ARGUMENTS, environments=list(IDLE.values())) as engines:
            rounds.append(asyncio.run(_idle_round(number, dict(zip(IDLE, engines, strict=True)), loads, arguments)))
        # Each round is worth something by itself: whoever has little time at once runs one after the other.
        for load in loads:
            print_idle(load, rounds)


async def _idle_round(
    number: int, engines: dict[str, Engine], loads: list[Load], arguments: argparse.Namespace
) -> dict[str, Figures]:
    figures: dict[str, Figures] = {name: {} for name in engines}
    for engine in engines.values():
        await measure(engine, direct(engine)[:1], [load_of(4, 30, 1.0)], 1, warm_up=True)
    for turn in range(arguments.idle_turns):
        order = list(engines)[:: 1 if turn % 2 else -1]
        for load, name in itertools.product(loads, order):
            taken = await measure(engines[name], direct(engines[name])[:1], [load], 1, plugin=name, round=number)
            for key, turns in taken.items():
                figures[name].setdefault(key, []).extend(turns)
    return figures


def print_idle(load: Load, rounds: list[dict[str, Figures]]) -> None:
    """The plugin's price where nobody uses it, beside the ratio of two engines of which neither has it."""
    costs = {name: [_costs(load, figures[name]) for figures in rounds] for name in IDLE}
    print(f"\n{load.name}, plugin loaded and not used: CPU microseconds per token, a line a round")
    for name, values in costs.items():
        for turns in values:
            print(f"{name:24}" + "".join(f"{value:8.1f}" for value in turns))
    for name in ("with", "without again"):
        pairs = [
            [turn / base for turn, base in zip(turns, bases, strict=True)]
            for turns, bases in zip(costs[name], costs["without"], strict=True)
        ]
        ratios = sorted(itertools.chain.from_iterable(pairs))
        median, of_rounds = statistics.median(ratios), [statistics.median(pair) for pair in pairs]
        print(f"{name:16} / without: median {median:.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}")
        print_line(
            load=load.name,
            ratio_of=name,
            median=round(median, 3),
            rounds=[round(ratio, 3) for ratio in of_rounds],
            turns=[round(ratio, 3) for ratio in ratios],
        )


def _costs(load: Load, figures: Figures) -> list[float]:
    [turns] = [turns for (name, _), turns in figures.items() if name == load.name]
    return [turn.microseconds for turn in turns]


# -- the command ---------------------------------------------------------------------------------------

LOADS: Final = {"16": (16, 30), "64": (64, 30), "256": (256, 150), "flat": (64, 0)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way and load (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.5, help="the steady part of a turn (default %(default)s)")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), help="default: all")
    parser.add_argument(
        "--idle-rounds", type=int, default=2, help="engines with and without the plugin; 0: none (default %(default)s)"
    )
    parser.add_argument("--idle-turns", type=int, default=4, help="turns of each such engine (default %(default)s)")
    parser.add_argument(
        "--beside",
        metavar="NAME=PROXY_DIRECTORY",
        action="append",
        default=[],
        help="another checkout's proxy/ to compare with, in the same run; may be repeated",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    print_line(load_average=os.getloadavg(), cores=os.cpu_count())
    if arguments.rounds:
        measure_ways(arguments)
    if arguments.idle_rounds:
        measure_idle(arguments)
    print_line(load_average=os.getloadavg())


if __name__ == "__main__":
    main()
