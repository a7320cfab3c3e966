"""The borders at which bytes of others come in, and what must be true at each whatever they are.

A border takes any bytes. What it calls may refuse them by the errors that it documents; anything else is a finding.
`test_borders.py` feeds it the corpus and mutations of it, `coverage_guided.py` what a coverage-guided fuzzer makes up.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from cryptography.hazmat.primitives.asymmetric import rsa
from jsonschema import Draft202012Validator
from jwt import PyJWKSet
from jwt.algorithms import RSAAlgorithm
from multidict import CIMultiDict

from penstock.access_settings import Auth, JwtSettings, read_key
from penstock.core import prompt, resuming, sse
from penstock.core.engine_stream import ChatReader
from penstock.core.errors import CallerError, Problem
from penstock.core.frames import FrameError, read_message
from penstock.core.recording import RecordingError, parse_recording
from penstock.core.request import read_request
from penstock.core.signals import EngineClosed
from penstock.core.verifier import LogError, parse_log, verify
from penstock.settings import SettingsError, load_settings
from penstock.shell import tokens
from penstock.shell.accept import accepted
from penstock.shell.auth import Gatekeeper, hash_key
from penstock.shell.passthrough import EngineCount
from penstock.shell.telemetry import Telemetry
from support.chunks import DONE, answer_of
from support.playbook import FAMILY_NAMES, STARTED, ask, play

LINE_BYTES = 4096
KEY = "alices-key-0123456789"
_PRIVATE = rsa.generate_private_key(65537, 2048)
_JWKS = PyJWKSet([{**RSAAlgorithm.to_jwk(_PRIVATE.public_key(), as_dict=True), "kid": "rsa-1"}])
_JWT = JwtSettings(issuer="https://login.example/", audience="penstock", jwks_url="https://login.example/keys")
_TELEMETRY = Telemetry(None)
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
_ARGUMENTS = Draft202012Validator(_SCHEMA)


def request_body(data: bytes) -> None:
    """Read, or refused with a status of the caller's; what goes on to the engine is JSON again, without our options."""
    for streams in (None, True):
        with contextlib.suppress(CallerError):
            request = read_request(data, streams=streams, engine_parses_tools=False)
            sent = orjson.loads(request.engine_body)
            assert len(prompt.prefix_key(request.engine_body, 4096)) == 16
            assert len(prompt.last_question(request.engine_body)) <= len(data)
            assert prompt.least_tokens(request.engine_body, None) <= len(data)
            assert "penstock" not in sent
            assert request.choices >= 1
            assert request.text_bytes <= 4 * len(data)


def engine_stream(data: bytes) -> None:
    """Whatever an engine says, the client's log keeps every guarantee and ends once (the playbook checks both)."""
    cuts = [at * len(data) // 5 for at in range(1, 5)]
    closed = EngineClosed(None, STARTED + 1)
    outcome = play(ask(tools=["weather"], n=2), [data, DONE, closed], cuts=cuts)
    assert outcome.exchange.is_over


def tool_markup(data: bytes) -> None:
    """Whatever a model writes for a call: what is ready was offered, fits its schema, and is ready once.

    The first byte chooses the model's family.
    """
    family = FAMILY_NAMES[data[0] % len(FAMILY_NAMES)] if data else FAMILY_NAMES[0]
    text = data[1:].decode(errors="replace")
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    outcome = play({**ask(), "tools": [_TOOL]}, answer_of(pieces), family=family)
    ready = outcome.all_of("tool_call.ready")
    assert len({event["call_id"] for event in ready}) == len(ready)
    for event in ready:
        assert event["name"] == "f"
        assert _ARGUMENTS.is_valid(event["arguments"])


def engine_answer(data: bytes) -> None:
    """An unstreamed answer is read or is the engine's fault, and never an exception."""
    ChatReader(LINE_BYTES, 1).read_whole(data)


def event_stream(data: bytes) -> None:
    """Any cut gives the same events, up to the cap on a line."""

    def read(pieces: list[bytes]) -> list[Any]:
        parser = sse.Parser(LINE_BYTES * 64)
        return [frame for piece in pieces for frame in parser.feed(piece)]

    half = len(data) // 2
    assert read([data]) == read([data[:half], data[half:]]) == read([bytes([byte]) for byte in data])


def frames(data: bytes) -> None:
    """The plugin's records, or the one error that drops its connection."""
    with contextlib.suppress(FrameError):
        read_message(data)


def settings_file(data: bytes) -> None:
    """Settings, or the error that names key and remedy."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(SettingsError):
            load_settings(Path(file.name), environment={})


def keys_file_line(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        read_key(data.decode(errors="replace")).allowed({})


def headers(data: bytes) -> None:
    """Every header that we read, as aiohttp gives it: bytes that are no UTF-8 as lone surrogates."""
    value = data.decode(errors="surrogateescape")
    with contextlib.suppress(CallerError):
        accepted(value)
    with contextlib.suppress(CallerError):
        key = resuming.read_idempotency_key(value)
        assert key is None or key.isprintable()
    names = ("Authorization", "X-Api-Key", "traceparent", "tracestate", "baggage")
    given = CIMultiDict(dict.fromkeys(names, value))
    _TELEMETRY.begin(given, "/v1/streams", "st_1").refuse("fuzz", 400)
    with contextlib.suppress(Problem):
        asyncio.run(_authenticate(given))


def cursor(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    for last_event_id, after in ((text, None), (None, text)):
        with contextlib.suppress(CallerError):
            assert 0 <= resuming.read_cursor("st_1", last_event_id, after) < 10**15
    with contextlib.suppress(CallerError):
        assert 0 <= resuming.read_after(data) < 10**15


def token(data: bytes) -> None:
    """No mutation of a token is ever good; every one is refused in our own words."""
    caller = asyncio.run(_check_token(data.decode(errors="surrogateescape")))
    assert caller is None


def event_log(data: bytes) -> None:
    """`penstock verify` on any file."""
    with contextlib.suppress(LogError):
        verify(parse_log(data))


def recording(data: bytes) -> None:
    """`penstock replay` on any file."""
    with contextlib.suppress(RecordingError):
        parse_recording(data, "fuzz")


def passed_answer(data: bytes) -> None:
    """The count in an answer that is passed on: found wherever the reads cut it, and a number of tokens."""

    def told(pieces: list[bytes]) -> tuple[int, int] | None:
        count = EngineCount()
        for piece in pieces:
            count.look_at(piece)
        return count.told()

    tokens = told([data])
    assert tokens is None or min(tokens) >= 0
    if len(data) <= EngineCount.KEPT_BYTES:
        half = len(data) // 2
        assert tokens == told([data[:half], data[half:]]) == told([bytes([byte]) for byte in data])


async def _authenticate(given: CIMultiDict[str]) -> None:
    gatekeeper = await Gatekeeper.load(Auth(keys={"alice": hash_key(KEY)}))
    await gatekeeper.authenticate(given)


async def _check_token(text: str) -> Any:
    checker = tokens.Tokens(_JWT, Auth(jwt=_JWT), lambda: 100.0)
    checker._keys, checker._fetched_at, checker._tried_at = _JWKS.keys, 100.0, 100.0
    with contextlib.suppress(CallerError):
        return await checker.caller(text)


BORDERS: dict[str, Callable[[bytes], None]] = {
    border.__name__: border
    for border in (
        request_body,
        engine_stream,
        tool_markup,
        engine_answer,
        event_stream,
        frames,
        settings_file,
        keys_file_line,
        headers,
        cursor,
        token,
        event_log,
        recording,
        passed_answer,
    )
}
