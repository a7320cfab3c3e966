"""The real vLLM engine with the tiny scripted model of `examples/tiny_vllm`, for tests, demo and bench.

`running_engine()` takes some 30 s and one core: start one for a whole session and share it. Everything here
is synchronous; from a coroutine call what talks to the engine (`metric` and its friends) by
`asyncio.to_thread`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[2]
SERVE = ROOT / "examples" / "tiny_vllm" / "serve.py"
WORK = ROOT / ".engine"

START_SECONDS = 240
STOP_SECONDS = 20
LOG_TAIL_LINES = 40
LONGEST_TOKEN_CHARACTERS = 32


class EngineUnavailable(Exception):
    """The engine cannot be started here; the text says why and what to do."""


class Tokens:
    """Text to token ids by the model's own vocabulary, without its tokenizer library.

    Greedy, longest piece first: not always the split that training would choose, but always one the model
    could have produced, and its ids decode to exactly the text.
    """

    def __init__(self, tokenizer_json: Path) -> None:
        content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
        self._learned: dict[str, int] = content["model"]["vocab"]
        self._added: dict[str, int] = {token["content"]: token["id"] for token in content["added_tokens"]}
        self._split = re.compile("(" + "|".join(map(re.escape, self._added)) + ")")
        self._letter = byte_letters()
        self.eos = self._added["<|im_end|>"]

    def encode(self, text: str, *, bytewise: bool = False) -> list[int]:
        """Ids of `text`; markers such as `<think>` are one id each. `bytewise`: one id for every other byte.

        A lone surrogate U+DC80 to U+DCFF stands for a byte that is no text, as in `os.fsdecode`.
        """
        longest = 1 if bytewise else LONGEST_TOKEN_CHARACTERS
        ids: list[int] = []
        for piece in self._split.split(text):
            if piece in self._added:
                ids.append(self._added[piece])
            else:
                ids.extend(
                    self._greedy(
                        "".join(self._letter[byte] for byte in piece.encode(errors="surrogateescape")),
                        longest,
                    )
                )
        return ids

    def _greedy(self, letters: str, longest: int) -> Iterator[int]:
        start = 0
        while start < len(letters):
            end = min(len(letters), start + longest)
            while letters[start:end] not in self._learned:
                end -= 1
            yield self._learned[letters[start:end]]
            start = end


def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


class Engine:
    """A running vLLM. `model` streams raw text; `parsed_model` is the same engine with vLLM's own parsers."""

    model = "tiny"
    parsed_model = "tiny-parsed"

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        port: int,
        log: Path,
        unix_socket: Path | None = None,
        api_key: str | None = None,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.unix_socket = unix_socket
        """Where it listens instead, if it was started with `--uds`."""
        self.log = log
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._process = process
        self._tokens: Tokens | None = None

    @property
    def tokens(self) -> Tokens:
        if self._tokens is None:
            [model] = json.loads(self._get("/v1/models"))["data"][:1]
            self._tokens = Tokens(Path(model["root"]) / "tokenizer.json")
        return self._tokens

    def script(self, text: str, *, eos: bool = True, bytewise: bool = False) -> list[int]:
        """Ids for `vllm_xargs: {"script": ids}` that make the model say `text` and, with `eos`, stop."""
        ids = self.tokens.encode(text, bytewise=bytewise)
        return [*ids, self.tokens.eos] if eos else ids

    def version(self) -> str:
        """vLLM's version, such as "0.32.0"."""
        version: str = json.loads(self._get("/version"))["version"]
        return version

    def running_requests(self) -> int:
        """Requests that the scheduler holds in its batch; each choice of a request with n > 1 counts."""
        return int(self.metric("vllm:num_requests_running"))

    def waiting_requests(self) -> int:
        return int(self.metric("vllm:num_requests_waiting"))

    def kv_cache_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1; one block is 32 tokens, 1/1024 of it."""
        return self.metric("vllm:kv_cache_usage_perc")

    def metric(self, name: str) -> float:
        """The sum of a metric over its label sets, as the engine reports it now."""
        lines = self._get("/metrics").decode().splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{| )", line)]
        if not values:
            raise LookupError(f"the engine reports no metric {name}")
        return sum(values)

    def is_healthy(self) -> bool:
        try:
            self._get("/health")
        except (URLError, OSError):
            return False
        return True

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End every process of the engine at once, as a lost machine would."""
        self._signal(signal.SIGKILL)

    def kill_core(self) -> None:
        """End the engine core only: the API server lives on for a moment and reports to its clients."""
        for child in self._children("VLLM::EngineCor"):
            os.kill(child, signal.SIGKILL)

    def kill_api_server(self) -> None:
        """End one of several API server processes."""
        os.kill(self._children("VLLM::APIServer")[0], signal.SIGKILL)

    def _children(self, name: str) -> list[int]:
        """Child processes by the beginning of their name."""
        lists = [listed.read_text() for listed in Path(f"/proc/{self._process.pid}/task").glob("*/children")]
        pids = [int(child) for listed in lists for child in listed.split()]
        return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().startswith(name)]

    def stop(self) -> None:
        """Ask the engine to end, wait, then insist."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait(STOP_SECONDS)
        if self._process.stdin:
            self._process.stdin.close()

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _get(self, path: str) -> bytes:
        if self.unix_socket is not None:
            return _get_over(self.unix_socket, path, self._headers)
        with urlopen(Request(self.url + path, headers=self._headers), timeout=10) as response:
            content: bytes = response.read()
        return content


def _get_over(unix_socket: Path, path: str, headers: Mapping[str, str]) -> bytes:
    connection = HTTPConnection("vllm", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(str(unix_socket))
        connection.request("GET", path, headers=headers)
        return connection.getresponse().read()
    finally:
        connection.close()


def interpreter() -> Path:
    """The Python that has vLLM: PENSTOCK_VLLM_PYTHON, or `.venv-vllm` at the root of the repository."""
    named = os.environ.get("PENSTOCK_VLLM_PYTHON")
    python = Path(named) if named else ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        raise EngineUnavailable(
            f"no vLLM interpreter at {python}: make a virtual environment there with vLLM in it, "
            "or let PENSTOCK_VLLM_PYTHON name one"
        )
    return python


@contextmanager
def running_engine(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Engine]:
    """Start the engine with more vLLM `arguments`, wait until it is healthy, stop it at the end.

    Raises EngineUnavailable, with the end of its log, when it does not come up. One engine runs at a time on
    a checkout: a second caller waits for the first. An engine never outlives the process that started it.
    """
    with running_engines(*arguments, environments=[environment or {}]) as [engine]:
        yield engine


@contextmanager
def running_engines(*arguments: str, environments: Sequence[Mapping[str, str]]) -> Iterator[list[Engine]]:
    """The same for several that must run at once: one for each environment."""
    python = interpreter()
    WORK.mkdir(exist_ok=True)
    with only_engine(), ExitStack() as stack:
        engines = []
        for number, environment in enumerate(environments):
            engines.append(launch(python, arguments, environment, f"engine-{number}.log" if number else "engine.log"))
            stack.callback(engines[-1].stop)
        for engine in engines:
            wait_until_healthy(engine)
        yield engines


@contextmanager
def only_engine() -> Iterator[None]:
    with (WORK / "lock").open("w") as lock:

        def locked() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        if not poll(locked, START_SECONDS):
            raise EngineUnavailable(f"another engine held {WORK / 'lock'} for {START_SECONDS} s")
        yield


def launch(python: Path, arguments: tuple[str, ...], environment: Mapping[str, str], log_name: str) -> Engine:
    port = free_port()
    log = WORK / log_name
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, SERVE, "--port", str(port), "--stop-with-stdin", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    said = dict(pairwise(arguments))
    return Engine(process, port, log, Path(said["--uds"]) if "--uds" in said else None, said.get("--api-key"))


def wait_until_healthy(engine: Engine) -> None:
    poll(lambda: engine.is_healthy() or not engine.is_alive(), START_SECONDS)
    if not (engine.is_alive() and engine.is_healthy()):
        raise EngineUnavailable(f"vLLM did not come up; the end of {engine.log}:\n{engine.log_tail()}")


def poll(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
