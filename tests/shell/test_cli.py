"""The commands, their exit status and what they say."""

import io
import json
import re
import socket
import sys
from pathlib import Path

import pytest

from penstock import __version__, cli
from penstock.shell.auth import hash_key
from support.commands import penstock, serving
from support.http_client import calling
from support.upstreams import in_front_of, replay, replayed

BROKEN_LOGS = Path(__file__).parents[1] / "vectors" / "broken_logs"
GOLDEN = Path(__file__).parents[1] / "vectors" / "golden"
UPSTREAM = ("--upstream", "http://127.0.0.1:9")

Captured = pytest.CaptureFixture[str]


# --- serve ------------------------------------------------------------------------------------------


async def test_serve_says_where_it_listens_and_serves() -> None:
    async with (
        serving("replay", "--port", "0", "--speed", "0") as engine,
        serving("serve", "--upstream", engine.url, "--port", "0") as sidecar,
        calling(sidecar.url) as caller,
    ):
        answer = await caller.stream()
        assert answer.end["status"] == "completed"
        sidecar.terminate()
        outcome = await sidecar.ended()
        assert outcome.status == 0
        assert f"stream {answer.headers['X-Stream-Id']} ended completed: principal=anonymous" in outcome.errors
        engine.interrupt()
        assert (await engine.ended()).status == 0


async def test_serve_refuses_to_be_an_open_relay() -> None:
    outcome = await penstock("serve", *UPSTREAM, "--host", "0.0.0.0", "--port", "0")
    assert outcome.status == 2
    assert outcome.output == ""
    for words in ("penstock serve: ", "0.0.0.0", "no API keys", "auth.keys_file", "auth.allow_anonymous"):
        assert words in outcome.errors
    assert "Traceback" not in outcome.errors


async def test_serve_says_loudly_that_it_was_told_to_be_one() -> None:
    async with serving("serve", *UPSTREAM, "--host", "0.0.0.0", "--port", "0", "--allow-anonymous") as sidecar:
        sidecar.terminate()
        outcome = await sidecar.ended()
    assert outcome.status == 0
    assert "WARNING" in outcome.errors
    assert "0.0.0.0 WITHOUT API KEYS" in outcome.errors


async def test_serve_beyond_loopback_with_keys_warns_of_nothing(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"alice={hash_key('k' * 20)}\n")
    command = ("serve", *UPSTREAM, "--host", "0.0.0.0", "--port", "0", "--keys-file", str(keys))
    async with serving(*command) as sidecar:
        async with calling(sidecar.url.replace("0.0.0.0", "127.0.0.1")) as caller:
            assert (await caller.stream()).status == 401
        sidecar.terminate()
        assert "WARNING" not in (await sidecar.ended()).errors


async def test_serve_on_a_port_in_use_exits_with_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = await penstock("serve", *UPSTREAM, "--port", str(taken.getsockname()[1]))
    assert outcome.status == 1
    assert "penstock serve: " in outcome.errors
    assert "in use" in outcome.errors
    assert "Traceback" not in outcome.errors


async def test_serve_with_a_wrong_variable_names_it() -> None:
    outcome = await penstock("serve", *UPSTREAM, environment={"PENSTOCK_LIMITS__STREAM_SECONDS": "soon"})
    assert outcome.status == 2
    assert "limits.stream_seconds: 'soon' (from PENSTOCK_LIMITS__STREAM_SECONDS) is wrong" in outcome.errors


async def test_serve_with_keys_that_cannot_be_read_exits_with_2() -> None:
    outcome = await penstock("serve", *UPSTREAM, "--keys-file", "nothing.txt", "--port", "0")
    assert outcome.status == 2
    assert "auth.keys_file: nothing.txt cannot be read" in outcome.errors


# --- The rest, in this process ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PENSTOCK_UPSTREAMS", "PENSTOCK_LISTEN__HOST"):
        monkeypatch.delenv(name, raising=False)


def test_check_config_shows_the_settings_and_no_secret(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text("{upstreams: [{url: 'http://vllm:8000', api_key: top-secret}], limits: {stream_seconds: 7}}")
    assert cli.main(["check-config", "--config", str(file), "--port", "9000"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["limits"]["stream_seconds"] == 7
    assert json.loads(shown)["listen"]["port"] == 9000
    assert "top-secret" not in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["check-config"], "upstreams: is missing"),
        (["check-config", "--upstream", "vllm:8000"], "upstreams.0.url: 'vllm:8000' (from --upstream) is wrong"),
        (["check-config", *UPSTREAM, "--reasoning", "loud"], "reasoning: 'loud' (from --reasoning) is wrong"),
        (["check-config", *UPSTREAM, "--host", "10.0.0.1"], "auth.keys_file"),
        (["check-config", *UPSTREAM, "--keys-file", "nothing.txt"], "auth.keys_file: nothing.txt cannot be read"),
        (["check-config", "--config", "nothing.yaml"], "nothing.yaml: cannot be read"),
        (["replay", "nothing.jsonl", "--port", "0"], "nothing.jsonl: cannot be read"),
        (["replay", "--fault", "explode", "--port", "0"], "Unknown fault"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_to_do(capsys: Captured, arguments: list[str], sentence: str) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert f"penstock {arguments[0]}: " in captured.err
    assert sentence in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["serve", "--nothing"], ["serve", "--port", "x"], ["verify"]])
def test_a_wrong_call_exits_with_2_and_the_usage(capsys: Captured, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: penstock" in capsys.readouterr().err


def test_the_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"penstock {__version__}\n"


def test_hash_key_prints_what_may_be_stored(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "0123456789abcdef"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{key}\n"))
    assert cli.main(["hash-key"]) == 0
    assert capsys.readouterr().out == hash_key(key) + "\n"


def test_hash_key_refuses_a_key_that_can_be_guessed(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("short\n"))
    assert cli.main(["hash-key"]) == 2
    captured = capsys.readouterr()
    assert "shorter than 16 characters" in captured.err
    assert "short\n" not in captured.out


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_verify_accepts_what_was_served(tmp_path: Path, capsys: Captured, accept: str) -> None:
    async with in_front_of(replay()) as setup:
        answer = await setup.caller.stream(accept, **replayed("thinking"))
    log = tmp_path / "log"
    log.write_bytes(answer.body)
    assert cli.main(["verify", str(log)]) == 0
    assert capsys.readouterr().out == f"{len(answer.events)} events keep every guarantee\n"


async def test_verify_reads_standard_input() -> None:
    [log, *_] = sorted(GOLDEN.glob("*.ndjson"))
    outcome = await penstock("verify", "-", given=log.read_bytes())
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.endswith("events keep every guarantee\n")


@pytest.mark.parametrize("name", ["g1-gap", "g2-no-end", "g6-unaccounted", "usage-two-final"])
def test_verify_names_what_is_broken(capsys: Captured, name: str) -> None:
    assert cli.main(["verify", str(BROKEN_LOGS / f"{name}.ndjson")]) == 1
    captured = capsys.readouterr()
    assert re.match(r"(G\d|usage|status): ", captured.out)
    assert captured.err == ""


def test_verify_of_what_is_no_log_exits_with_2(tmp_path: Path, capsys: Captured) -> None:
    log = tmp_path / "log"
    log.write_text("hello\n")
    assert cli.main(["verify", str(log)]) == 2
    assert "penstock verify: " in capsys.readouterr().err


def test_verify_of_a_file_that_is_not_there_exits_with_1(capsys: Captured) -> None:
    assert cli.main(["verify", "nothing.log"]) == 1
    assert "nothing.log" in capsys.readouterr().err
