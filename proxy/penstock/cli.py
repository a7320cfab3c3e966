"""The commands: serve, demo, replay, verify, check-config, hash-key."""

import argparse
import asyncio
import getpass
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock import __version__, app, demo
from penstock.core.recording import Recording, describe_faults
from penstock.core.verifier import LogError, parse_log, verify
from penstock.settings import Settings, SettingsError, load_settings
from penstock.shell.auth import Gatekeeper, hash_key
from penstock.shell.replay import run_replay
from penstock.shell.rulebook import load_rulebook
from penstock.shell.tls import TlsFiles

# What a wrong setting or wrong input exits with, as argparse does for wrong flags.
_WRONG_USE = 2
# What begins a line somewhere, or steers a terminal.
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


class _OneLine(logging.Formatter):
    """A record is one line, whatever callers and engines have called what it tells of; only a traceback has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name in the base class
        return super().formatMessage(record).translate(_ESCAPED)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 the answer is no, 2 something about the call or the settings is wrong."""
    parsed = _parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except (SettingsError, LogError, ValueError) as error:
        print(f"penstock {parsed.command}: {error}", file=sys.stderr)
        return _WRONG_USE
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"penstock {parsed.command}: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="penstock", description="A streaming gateway in front of vLLM.")
    parser.add_argument("--version", action="version", version=f"penstock {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="stand in front of a vLLM server")
    _add_settings(serve)
    serve.set_defaults(run=_serve)
    check = commands.add_parser("check-config", help="say whether the settings are right, without serving")
    _add_settings(check)
    check.set_defaults(run=_check_config)
    shown = commands.add_parser("demo", help="show a stream in the terminal, with an embedded engine")
    shown.add_argument("--upstream", metavar="URL", help="a vLLM server instead of the embedded replay engine")
    shown.set_defaults(run=_demo)
    replay = commands.add_parser("replay", help="a mock vLLM that replays recorded streams and can misbehave")
    replay.add_argument("paths", metavar="PATH", nargs="*", type=Path, help="recordings or folders of them")
    replay.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    replay.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    replay.add_argument("--speed", type=float, default=1.0, help="2 is twice as fast, 0 as fast as possible")
    replay.add_argument("--fault", help=f"misbehave: {describe_faults()}")
    replay.set_defaults(run=_replay)
    verifier = commands.add_parser("verify", help="tell whether an event log (SSE or NDJSON) keeps the guarantees")
    verifier.add_argument("file", metavar="FILE", help="the log, or - for standard input")
    verifier.set_defaults(run=_verify)
    hasher = commands.add_parser("hash-key", help="read an API key and print the form in which it is stored")
    hasher.set_defaults(run=_hash_key)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings in YAML")
    parser.add_argument("--upstream", metavar="URL", action="append", help="base URL of a vLLM server; once for each")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default 8080)")
    parser.add_argument("--reasoning", help="separate, hide or inline")
    parser.add_argument("--keys-file", metavar="FILE", help="hashed API keys, a line each: name=sha256:<hex>")
    parser.add_argument("--allow-anonymous", action="store_true", default=None, help="serve without keys on any host")


def _settings(parsed: argparse.Namespace) -> Settings:
    flags = {
        "upstreams": [{"url": url} for url in parsed.upstream] if parsed.upstream else None,
        "listen.host": parsed.host,
        "listen.port": parsed.port,
        "reasoning": parsed.reasoning,
        "auth.keys_file": parsed.keys_file,
        "auth.allow_anonymous": parsed.allow_anonymous,
    }
    return load_settings(parsed.config, flags=flags)


def _serve(parsed: argparse.Namespace) -> int:
    settings = _settings(parsed)

    def announce(url: str) -> None:
        engines = ", ".join(upstream.url for upstream in settings.upstreams)
        print(f"penstock {__version__} on {url} in front of {engines}", flush=True)

    asyncio.run(app.serve(settings, announce))
    return 0


def _check_config(parsed: argparse.Namespace) -> int:
    settings = _settings(parsed)
    asyncio.run(Gatekeeper.load(settings.auth))
    load_rulebook(settings.moderation)
    if settings.listen.tls is not None:
        TlsFiles.load(settings.listen.tls)
    print(settings.model_dump_json(indent=2))
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    logging.getLogger("penstock").setLevel(logging.WARNING)
    return asyncio.run(demo.show(parsed.upstream))


def _replay(parsed: argparse.Namespace) -> int:
    def announce(url: str, recordings: Sequence[Recording]) -> None:
        names = ", ".join(recording.name for recording in recordings)
        print(f"penstock replay on {url} with {names}", flush=True)

    replay = run_replay(parsed.paths, parsed.host, parsed.port, parsed.speed, parsed.fault, announce)
    asyncio.run(app.until_stopped(replay))
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    data = sys.stdin.buffer.read() if parsed.file == "-" else Path(parsed.file).read_bytes()
    events = parse_log(data)
    violations = verify(events)
    for violation in violations:
        print(violation)
    if not violations:
        print(f"{len(events)} events keep every guarantee")
    return 1 if violations else 0


def _hash_key(_parsed: argparse.Namespace) -> int:
    key = getpass.getpass("API key: ") if sys.stdin.isatty() else sys.stdin.readline().strip()
    if len(key) < 16:
        raise ValueError("the key is shorter than 16 characters; `openssl rand -hex 32` makes a good one")
    print(hash_key(key))
    return 0
