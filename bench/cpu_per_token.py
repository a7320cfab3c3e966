"""CPU microseconds that Penstock's process spends per streamed token, beside nginx and a bare aiohttp byte proxy.

With `--peers DIRECTORY` also beside the Shepherd Model Gateway (smg, Rust), in a virtual environment there (made if it
is missing). All stand in front of the same cheap upstream and take turns within one run, so that their ratios hold even
where the machine is noisy. Every token of every stream is checked to have arrived; a turn that lost one fails the run.
`bench/README.md` says how to run it, `docs/explanation/cost.md` what it found.
"""

import argparse
import asyncio
import bisect
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The other scripts, wherever this one is started from.
sys.path.insert(0, str(HERE.parent))

from bench.peers import START_SECONDS as PEER_START_SECONDS  # noqa: E402
from bench.peers import peer_python, smg_command, version  # noqa: E402

NO_NGINX = "nginx is not installed; `apt-get install nginx-light` (Debian, Ubuntu) brings it"
NGINX_CONFIG = """
daemon off; master_process off; worker_processes 1;
pid {directory}/nginx.pid; error_log {directory}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; tcp_nodelay on; keepalive_requests 1000000;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 512; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""

START_SECONDS = 20.0
STOP_SECONDS = 10.0
# Streams run this long before the steady part begins, and a little longer than it lasts.
SETTLE_SECONDS = 1.0
TAIL_SECONDS = 0.5
TURN_SECONDS = 120.0

CHAT = "/v1/chat/completions"
STREAMS = "/v1/streams"

THOUGHT = "The user wants to know how a turbine is fed. I should explain the gate, the pressure and the flow. "
ANSWER = (
    "A penstock is the gated pipe that feeds a turbine: it lets exactly as much through as the machine can take, "
    'and it can be shut.\n\n- "Head" is the height of the water, h = p / (ρ·g).\n- 水管 carries it down the hill 🏔. '
)
_PIECE = re.compile(r"\s?\w{1,6}|\s|[^\w\s]")


# -- what is streamed ----------------------------------------------------------------------------------


class Script:
    """What the model says, token by token: a thought of 50 tokens between its markers, then an answer."""

    def __init__(self, length: int) -> None:
        thought = itertools.islice(itertools.cycle(_PIECE.findall(THOUGHT)), 50)
        answer = itertools.cycle(_PIECE.findall(ANSWER))
        said = itertools.chain(["<think>", "\n"], thought, ["</think>", "\n\n"], answer)
        self.tokens = list(itertools.islice(said, length))

    def visible(self, length: int, *, raw: bool) -> list[str]:
        """The first `length` tokens as a client gets them: `raw` with the markers, else without."""
        return [token if raw or token not in ("<think>", "</think>") else "" for token in self.tokens[:length]]

    def chunks(self) -> dict[str, list[str]]:
        """The SSE events of vLLM 0.32 (raw mode, usage with every chunk), for `upstream.py`."""
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        finish = {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "stop"}
        last = {"stop_reason": None, "token_ids": None}
        return {
            "head": [_event([role], 0, {"prompt_token_ids": None, "prompt_text": None})],
            "tokens": [_event([_spoken(token)], count) for count, token in enumerate(self.tokens, 1)],
            "tail": [_event([{**finish, **last}], 0), "data: [DONE]\n\n"],
        }


def _spoken(token: str) -> dict[str, Any]:
    return {"index": 0, "delta": {"content": token}, "logprobs": None, "finish_reason": None, "token_ids": None}


def _event(choices: list[dict[str, Any]], count: int, more: dict[str, Any] | None = None) -> str:
    usage = {"prompt_tokens": 16, "total_tokens": 16 + count, "completion_tokens": count}
    chunk = {
        "id": "chatcmpl-8f14e45fceea167a5a36dedd4bea2543",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "bench",
        "choices": choices,
        "usage": {**usage, "completion_tokens_details": None},
        **(more or {}),
    }
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass(frozen=True)
class Load:
    """`streams` at once; `rate` tokens a second each (0: as fast as they are taken), in `phases` ticks a period."""

    name: str
    streams: int
    rate: float
    phases: int
    tokens: int
    steady_seconds: float


@dataclass(frozen=True)
class Upstream:
    pid: int
    port: int


# -- who passes it on ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One way through one proxy, whose process is `pid`."""

    name: str
    pid: int
    upstream_pid: int
    port: int
    route: str
    is_raw: bool


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str | Path],
    port: int,
    environment: dict[str, str] | None = None,
    start_seconds: float = START_SECONDS,
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that listens on `port`, ended with the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
        try:
            _wait_until_listening(process, port, start_seconds)
            yield process
        except StartError as error:
            log.seek(0)
            raise SystemExit(f"{error}\n{log.read().decode(errors='replace')[-2000:]}") from None
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_SECONDS)


class StartError(Exception):
    """A process did not come up."""


def _wait_until_listening(process: "subprocess.Popen[bytes]", port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise StartError(f"{process.args!r} did not listen on port {port} within {seconds:g} s")


def nginx(stack: ExitStack, directory: Path, upstream: Upstream) -> list[Contender]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise SystemExit(NO_NGINX)
    port = free_port()
    config = directory / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(directory=directory, upstream=upstream.port, port=port))
    process = stack.enter_context(running([program, "-p", directory, "-c", config], port))
    return [Contender("nginx, bytes only", process.pid, upstream.pid, port, CHAT, is_raw=True)]


def byte_proxy(stack: ExitStack, upstream: Upstream) -> list[Contender]:
    port = free_port()
    command: list[str | Path] = [sys.executable, HERE / "byte_proxy.py", str(port), f"http://127.0.0.1:{upstream.port}"]
    process = stack.enter_context(running(command, port))
    return [Contender("aiohttp, bytes only", process.pid, upstream.pid, port, CHAT, is_raw=True)]


def smg(stack: ExitStack, upstream: Upstream, directory: Path) -> list[Contender]:
    """A Rust gateway that passes the chunks on."""
    python, port = peer_python(directory, "smg"), free_port()
    command = smg_command(python, f"http://127.0.0.1:{upstream.port}", port, free_port())
    process = stack.enter_context(running(command, port, start_seconds=PEER_START_SECONDS))
    wait_until_answered(port)
    return [Contender(f"smg {version(python, 'smg')}", process.pid, upstream.pid, port, CHAT, is_raw=True)]


def wait_until_answered(port: int) -> None:
    """smg listens before it knows its engine's models, and refuses requests until then."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=START_SECONDS).close()
            return
        time.sleep(0.1)
    raise SystemExit("smg did not learn of its engine's models")


def penstock(
    stack: ExitStack, upstream: Upstream, name: str = "penstock", source: Path | None = None
) -> list[Contender]:
    """Two contenders, one process. `source` is the `proxy` directory of another checkout."""
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PENSTOCK_"))}
    if source is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(source.resolve(strict=True)), *sys.path[1:]])
    command: list[str | Path] = [sys.executable, "-m", "penstock", "serve", "--port", str(port)]
    command += ["--upstream", f"http://127.0.0.1:{upstream.port}"]
    process = stack.enter_context(running(command, port, environment))
    return [
        Contender(f"{name}, chat completions", process.pid, upstream.pid, port, CHAT, is_raw=False),
        Contender(f"{name}, /v1/streams", process.pid, upstream.pid, port, STREAMS, is_raw=False),
    ]


# -- who reads it --------------------------------------------------------------------------------------


class Reader(asyncio.Protocol):
    """One client: keeps what comes, looks at nothing until its turn is over."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.received: list[bytes] = []
        self.size = 0
        self.began: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.received:
            self.began.set_result(None)
        self.received.append(data)
        self.size += len(data)

    def connection_lost(self, _exc: Exception | None) -> None:
        self.closed.set_result(None)


def request_bytes(contender: Contender, load: Load) -> bytes:
    turn = secrets.token_hex(8)
    body = json.dumps(
        {
            "model": "bench",
            "messages": [{"role": "user", "content": "How is a turbine fed?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": load.tokens,
            "penstock_bench": {"turn": turn, "rate": load.rate, "phases": load.phases, "streams": load.streams},
        }
    ).encode()
    head = f"POST {contender.route} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\naccept: text/event-stream\r\n"
    return head.encode() + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class LostTokensError(Exception):
    """A stream did not bring what the upstream said."""


class Transcript:
    """What one reader got: its whole text, and how much of it each byte of the connection had brought."""

    def __init__(self, received: list[bytes]) -> None:
        head, _, body = b"".join(received).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise LostTokensError(f"answered {head[:200]!r}")
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        pieces: list[str] = []
        length = 0
        for offset, event in _events(body, len(head) + 4):
            text = _text_of(event)
            if text:
                pieces.append(text)
                length += len(text)
                self._offsets.append(offset)
                self._lengths.append(length)
        self.text = "".join(pieces)

    def length_at(self, offset: int) -> int:
        """Characters of text in the first `offset` bytes."""
        position = bisect.bisect_right(self._offsets, offset)
        return self._lengths[position - 1] if position else 0


def _events(body: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """The SSE events of a chunked body, each with the offset on the connection at which its HTTP chunk ended."""
    position, held = 0, b""
    while True:
        end = body.index(b"\r\n", position)
        size = int(body[position:end], 16)
        if size == 0:
            return
        position = end + 2 + size + 2
        *events, held = (held + body[end + 2 : position - 2]).split(b"\n\n")
        for event in events:
            yield start + position, event


def _text_of(event: bytes) -> str:
    data = event.rpartition(b"data: ")[2]
    if not data.startswith(b"{"):
        return ""
    said: dict[str, Any] = json.loads(data)
    if "object" not in said:
        return str(said.get("text", "")) if said["type"].startswith("delta.") else ""
    return "".join(
        (choice["delta"].get("reasoning") or "") + (choice["delta"].get("content") or "") for choice in said["choices"]
    )


# -- a turn --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """The steady part: CPU of the proxy's process, tokens that its clients got, wall time.

    `others` is how many cores were busy with what is no part of this bench: noise, when it is not near 0.
    """

    cpu_seconds: float
    tokens: int
    seconds: float
    others: float

    @property
    def microseconds(self) -> float:
        return self.cpu_seconds / self.tokens * 1e6


def process_cpu_seconds(pid: int) -> float:
    """User and system time of all threads of `pid`.

    The same account as `utime` and `stime` in /proc, by the kernel's per-process clock: in nanoseconds instead of
    ticks of 10 ms. The number of that clock is made as `clock_getcpuclockid(3)` makes it.
    """
    return time.clock_gettime((~pid << 3) | 2)


def busy_seconds() -> float:
    """What all cores together have worked since the machine started, time stolen by its host included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, _first_line("/proc/stat").split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _first_line(path: str) -> str:
    with Path(path).open() as file:
        return file.readline()


@dataclass(frozen=True)
class _Mark:
    time: float
    cpu_seconds: float
    others: float
    sizes: list[int]

    @classmethod
    def now(cls, contender: Contender, readers: list[Reader]) -> "_Mark":
        cpu_seconds = process_cpu_seconds(contender.pid)
        ours = cpu_seconds + process_cpu_seconds(contender.upstream_pid) + time.process_time()
        return cls(time.monotonic(), cpu_seconds, busy_seconds() - ours, [reader.size for reader in readers])


async def take_turn(contender: Contender, load: Load, script: Script) -> Turn:
    request = request_bytes(contender, load)
    readers: list[Reader] = []
    try:
        async with asyncio.timeout(TURN_SECONDS):
            loop = asyncio.get_running_loop()
            for _ in range(load.streams):
                _, reader = await loop.create_connection(lambda: Reader(request), "127.0.0.1", contender.port)
                readers.append(reader)
            before = await _begin_steady_part(contender, load, readers)
            await _end_steady_part(load, readers)
            after = _Mark.now(contender, readers)
            await asyncio.wait({reader.closed for reader in readers})
        tokens = _count_tokens(contender, load, script, readers, before, after)
    except (TimeoutError, ValueError, LostTokensError) as error:
        raise SystemExit(f"{contender.name}, {load.name}: {error!r}") from error
    seconds = after.time - before.time
    return Turn(after.cpu_seconds - before.cpu_seconds, tokens, seconds, (after.others - before.others) / seconds)


async def _begin_steady_part(contender: Contender, load: Load, readers: list[Reader]) -> _Mark:
    if load.rate:
        await asyncio.sleep(SETTLE_SECONDS)
    await asyncio.wait({reader.began for reader in readers})
    return _Mark.now(contender, readers)


async def _end_steady_part(load: Load, readers: list[Reader]) -> None:
    """After its time where the streams are paced, else when all of them are over."""
    closed = {reader.closed for reader in readers}
    if not load.rate:
        await asyncio.wait(closed)
        return
    done, _ = await asyncio.wait(closed, timeout=load.steady_seconds, return_when=asyncio.FIRST_COMPLETED)
    if done:
        raise LostTokensError("a stream ended within the steady part")


def _count_tokens(
    contender: Contender, load: Load, script: Script, readers: list[Reader], before: _Mark, after: _Mark
) -> int:
    """Tokens between the marks. Raises `LostTokensError` unless every reader got the whole script."""
    said = script.visible(load.tokens, raw=contender.is_raw)
    text, lengths = "".join(said), list(itertools.accumulate(map(len, said)))
    tokens = 0
    for reader, start, end in zip(readers, before.sizes, after.sizes, strict=True):
        transcript = Transcript(reader.received)
        if transcript.text != text:
            raise LostTokensError(f"got {len(transcript.text)} characters that are not the {len(text)} said")
        first, last = (bisect.bisect_right(lengths, transcript.length_at(mark)) for mark in (start, end))
        tokens += last - first
    return tokens


# -- the figures ---------------------------------------------------------------------------------------

Figures = dict[tuple[str, str], list[Turn]]


async def measure(contenders: list[Contender], loads: list[Load], rounds: int, script: Script) -> Figures:
    """Takes turns: every contender once per load and round, so that noise falls on all alike."""
    warm_up = Load("warm-up", loads[0].streams, 0, 1, 200, 0)
    for contender in contenders:
        await take_turn(contender, warm_up, script)
    figures: Figures = {}
    for number, load, contender in itertools.product(range(1, rounds + 1), loads, contenders):
        turn = await take_turn(contender, load, script)
        figures.setdefault((load.name, contender.name), []).append(turn)
        print_line(
            turn=number,
            load=load.name,
            contender=contender.name,
            microseconds_per_token=round(turn.microseconds, 2),
            tokens=turn.tokens,
            tokens_per_second=round(turn.tokens / turn.seconds),
            cores_busy_otherwise=round(turn.others, 2),
        )
    return figures


def print_line(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def report(figures: Figures, loads: list[Load], contenders: list[Contender]) -> None:
    for load in loads:
        _print_table(load, {contender.name: figures[load.name, contender.name] for contender in contenders})
    for (load_name, name), turns in figures.items():
        costs = [turn.microseconds for turn in turns]
        others = {"nginx": contenders[0].name, "byte_proxy": contenders[1].name}
        print_line(
            load=load_name,
            contender=name,
            median=round(statistics.median(costs), 2),
            min=round(min(costs), 2),
            max=round(max(costs), 2),
            **{f"times_{key}": round(_ratio(turns, figures[load_name, other]), 2) for key, other in others.items()},
        )


def _print_table(load: Load, figures: dict[str, list[Turn]]) -> None:
    of_nginx, of_bytes = list(figures.values())[:2]
    print(f"\n{load.name}: CPU microseconds per token, {len(of_nginx)} turns each")
    print(f"{'':34}{'median':>8}{'min':>8}{'max':>8}{'x nginx':>9}{'x aiohttp':>11}{'tokens/s':>10}{'noise':>7}")
    for name, turns in figures.items():
        costs = [turn.microseconds for turn in turns]
        speed = statistics.median(turn.tokens / turn.seconds for turn in turns)
        noise = statistics.median(turn.others for turn in turns)
        row = f"{name:34}{statistics.median(costs):8.1f}{min(costs):8.1f}{max(costs):8.1f}"
        print(f"{row}{_ratio(turns, of_nginx):9.2f}{_ratio(turns, of_bytes):11.2f}{speed:10.0f}{noise:7.2f}")


def _ratio(turns: list[Turn], others: list[Turn]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a.microseconds / b.microseconds for a, b in zip(turns, others, strict=True))


def loads_of(arguments: argparse.Namespace) -> list[Load]:
    paced = int(arguments.rate * (SETTLE_SECONDS + arguments.seconds + TAIL_SECONDS))
    streams, rate, phases = arguments.streams, arguments.rate, arguments.phases
    known = {
        "paced": Load(f"{streams} streams, {rate:g} tokens/s", streams, rate, phases, paced, arguments.seconds),
        "flat": Load(f"{streams} streams, flat out", streams, 0, 1, arguments.flat_tokens, 0),
    }
    return [known[name] for name in arguments.loads]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender and load (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="the steady part of a turn (default %(default)s)")
    parser.add_argument("--streams", type=int, default=100, help="streams at once (default %(default)s)")
    parser.add_argument("--rate", type=float, default=50.0, help="tokens a second and stream (default %(default)s)")
    parser.add_argument(
        "--phases",
        type=int,
        default=1,
        help="deal the streams out over so many ticks a period; 1 is one engine's batch (default %(default)s)",
    )
    parser.add_argument("--flat-tokens", type=int, default=2000, help="tokens a stream, flat out (default %(default)s)")
    parser.add_argument("--loads", nargs="+", choices=["paced", "flat"], default=["paced", "flat"])
    parser.add_argument("--peers", type=Path, help="directory of the peer's virtual environment; without it no peer")
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
    loads = loads_of(arguments)
    script = Script(max(200, *(load.tokens for load in loads)))
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        chunks = directory / "chunks.json"
        chunks.write_text(json.dumps(script.chunks()))
        port = free_port()
        process = stack.enter_context(running([sys.executable, HERE / "upstream.py", str(port), chunks], port))
        upstream = Upstream(process.pid, port)
        contenders = [*nginx(stack, directory, upstream), *byte_proxy(stack, upstream)]
        if arguments.peers is not None:
            contenders += smg(stack, upstream, arguments.peers)
        contenders += penstock(stack, upstream)
        for other in arguments.beside:
            name, _, source = other.partition("=")
            contenders += penstock(stack, upstream, name, Path(source))
        figures = asyncio.run(measure(contenders, loads, arguments.rounds, script))
    report(figures, loads, contenders)


if __name__ == "__main__":
    main()
