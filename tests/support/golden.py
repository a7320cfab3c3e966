"""The golden corpus: the event log that Penstock makes of each recording of a real vLLM.

    cd tests && python -m support.golden            # says which logs differ from what is checked in
    cd tests && python -m support.golden --write    # writes them; read the diff before you commit it

A log is a function of its recording alone: the stream's id is fixed, the epoch is 0 and the clock is the
recording's own `ms`. A difference is a change of behaviour that every client will see.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from penstock.core.commands import Command, OpenClient, Respond, SendToClient
from penstock.core.dialects.native import NativeNdjson
from penstock.core.exchange import Exchange
from penstock.core.families import FAMILIES, choose_family
from penstock.core.pacing import SlowClient
from penstock.core.recording import Recording, parse_recording
from penstock.core.request import StreamRequest, read_request
from penstock.core.setting import Bounds, Setting
from penstock.core.signals import EngineAnswered, EngineClosed, EngineRefused, EngineSpoke, Signal
from support.playbook import tell

VECTORS: Final = Path(__file__).parent.parent / "vectors"
RECORDINGS: Final = VECTORS / "vllm-0.32"
GOLDEN: Final = VECTORS / "golden"
STREAM_ID: Final = "st_00112233445566778899aabbccddeeff"
BOUNDS: Final = Bounds(
    line_bytes=1 << 20,
    tool_call_bytes=1 << 20,
    stream_bytes=1 << 24,
    slow_client=SlowClient(frozenset(), 1 << 18, 30.0),
    stream_seconds=600.0,
    first_byte_seconds=1.0,
    heartbeat_seconds=15.0,
    engine_silence_seconds=20.0,
)

# The engine refused these before its first token (the grammar in band, the others with an HTTP status), so that
# Penstock answers with an HTTP status: no event log.
REFUSED: Final = frozenset(
    {"error-bad-request", "error-context", "error-grammar", "error-no-tool-parser", "error-unknown-model"}
)


@dataclass(frozen=True)
class Case:
    """One golden log: a recording and what its client asked of Penstock beyond the engine's own request."""

    recording: Recording
    options: Mapping[str, Any]
    suffix: str = ""

    @property
    def name(self) -> str:
        return self.recording.name + self.suffix

    @property
    def path(self) -> Path:
        return GOLDEN / f"{self.name}.ndjson"


# A template that opens the reasoning itself cannot be seen in the answer: the request names such a family.
_NEEDED: Final[Mapping[str, Mapping[str, Any]]] = {"thinking-opened-by-prompt": {"family": "deepseek-r1"}}
# The same recordings again, with options of Penstock.
_VARIANTS: Final[tuple[tuple[str, str, Mapping[str, Any]], ...]] = (
    ("thinking", ".hide", {"reasoning": "hide"}),
    ("thinking", ".inline", {"reasoning": "inline"}),
    ("thinking-parsed", ".inline", {"reasoning": "inline"}),
    ("choices", ".stop", {"stop": ["e"]}),
    ("plain", ".stop-included", {"stop": [" "], "include_stop": True}),
)


def read_recordings() -> dict[str, Recording]:
    """Every recording by its name, which is also its file's."""
    paths = sorted(RECORDINGS.glob("*.jsonl"))
    return {path.stem: parse_recording(path.read_bytes(), path.name) for path in paths}


def all_cases() -> list[Case]:
    """Every golden log that there should be."""
    recordings = read_recordings()
    plain = [Case(one, _NEEDED.get(name, {})) for name, one in recordings.items() if name not in REFUSED]
    return plain + [Case(recordings[name], options, suffix) for name, suffix, options in _VARIANTS]


def make_log(case: Case) -> bytes:
    """The case's event log as NDJSON."""
    return b"".join(data for command in carry_out(case) if (data := _sent(command)).strip())


def carry_out(case: Case) -> list[Command]:
    """Everything that an exchange commands while it hears the recording, from its first word to its end."""
    request = client_request(case)
    family = choose_family(FAMILIES, request.model, request.family)
    assert family is not None, "the last family fits every model"
    reasoning = request.reasoning or "separate"
    setting = Setting(STREAM_ID, "vllm", None, family, reasoning, BOUNDS, started=0.0, epoch_ms=0)
    exchange = Exchange(request, setting, lambda _: NativeNdjson(STREAM_ID))
    commands = exchange.start()
    for signal in _signals(case.recording):
        commands += tell(exchange, signal)
    return commands


def client_request(case: Case) -> StreamRequest:
    """What the client had asked for, if Penstock then sent the recorded request to the engine.

    A vLLM without a tool parser refuses requests with tools unless their `tool_choice` is "none"; for such an
    engine Penstock says so itself and reads the calls from the text. The client's request came without it.
    """
    body = dict(case.recording.request)
    engine_parses_tools = not (body.get("tools") and body.get("tool_choice") == "none")
    if not engine_parses_tools:
        del body["tool_choice"]
    if case.options:
        body["penstock"] = case.options
    return read_request(orjson.dumps(body), engine_parses_tools=engine_parses_tools)


def _signals(recording: Recording) -> list[Signal]:
    end = recording.chunks[-1].ms / 1000
    if recording.status != 200:
        return [EngineRefused(recording.status, recording.body, end)]
    if not recording.is_event_stream:
        return [EngineAnswered(recording.body, end)]
    spoken: list[Signal] = [EngineSpoke(chunk.data, chunk.ms / 1000) for chunk in recording.chunks]
    return [*spoken, EngineClosed(None, end)]


def _sent(command: Command) -> bytes:
    match command:
        case OpenClient() | SendToClient():
            return command.data.lstrip(b"\n")  # without the heartbeats, which are no events
        case Respond():
            raise ValueError(f"{command.status} instead of a stream: {command.body.decode()}")
        case _:
            return b""


def main(arguments: list[str]) -> int:
    """Compares the corpus with what is checked in, or writes it. Returns the exit status."""
    if arguments not in ([], ["--write"]):
        print(__doc__)
        return 2
    cases = all_cases()
    stale = set(GOLDEN.glob("*.ndjson")) - {case.path for case in cases}
    changed = {case.path: log for case in cases if (log := make_log(case)) != _read(case.path)}
    for path in sorted(stale | changed.keys()):
        print(f"{path.name}: {'no longer a case' if path in stale else 'differs'}")
    if arguments:
        _write(changed, stale)
        return 0
    return 1 if stale or changed else 0


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _write(changed: Mapping[Path, bytes], stale: set[Path]) -> None:
    GOLDEN.mkdir(exist_ok=True)
    for path, log in changed.items():
        path.write_bytes(log)
    for path in stale:
        path.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
