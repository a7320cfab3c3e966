"""The examples and the commands of the documents, run as they stand against a sidecar that replays recordings."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.core.verifier import parse_log, verify
from penstock.shell.replay import load_recordings, make_app, serving
from support.documents import DOCS, ROOT, Block, blocks, commands, pages, shown
from support.sidecar import sidecar

EXAMPLES = ROOT / "examples"
VECTORS = ROOT / "tests" / "vectors" / "vllm-0.32"
# Whole answers that vLLM gave, for the requests that do not stream.
RECORDINGS = (ROOT / "proxy" / "penstock" / "recordings", VECTORS / "whole.jsonl")
PATIENCE_SECONDS = 30.0
# They address a cluster, or an engine of the reader's own.
ELSEWHERE = {DOCS / "how_to" / "install_with_helm.md", DOCS / "how_to" / "try_on_a_laptop_cluster.md"}


@dataclass(frozen=True)
class Ran:
    status: int
    output: str
    errors: str


@asynccontextmanager
async def stage(speed: float = 0) -> AsyncIterator[str]:
    """A sidecar in front of a replay; yields its URL. At speed 0 the recordings go out as fast as they can."""
    recordings = load_recordings(RECORDINGS)
    async with serving(make_app(recordings, speed=speed)) as engine, sidecar(engine) as running:
        yield running.url


async def run(*command: str, **environment: str) -> Ran:
    """Runs a command of the repository's root, with this interpreter's `python` and `penstock` first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PENSTOCK_"))}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=pipe, stderr=pipe, env={**clean, "PATH": path, **environment}
    )
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise
    return Ran(process.returncode or 0, output.decode(), errors.decode())


# --- examples/curl ------------------------------------------------------------------------------------


def scripts() -> set[str]:
    return {path.stem for path in (EXAMPLES / "curl").glob("*.sh")}


async def run_script(name: str, *, speed: float = 0) -> str:
    async with stage(speed) as url:
        ran = await run("sh", str(EXAMPLES / "curl" / f"{name}.sh"), URL=url)
    assert (ran.status, ran.errors) == (0, "")
    return ran.output


EXPECTED: Mapping[str, str] = {
    "native_sse": "event: tool_call.ready",
    "ndjson": '"type":"delta.text"',
    "folded": '"text":"Hello! How can I help you today?"',
    "chat_stream": "data: [DONE]",
    "cancel": '"status":"cancelled"',
    "resume": "event: stream.end",
    "models": '"id":"tiny"',
    "schema": '"title": "Penstock event, schema 1.0"',
}


def test_every_script_is_run_here() -> None:
    assert scripts() == EXPECTED.keys()
    assert all(os.access(path, os.X_OK) for path in (EXAMPLES / "curl").glob("*.sh"))


@pytest.mark.parametrize("name", EXPECTED)
async def test_a_script_shows_what_it_promises(name: str) -> None:
    # Half speed leaves a stream of 5.6 s to be cancelled; the cancel ends it at once.
    output = await run_script(name, speed=0.5 if name == "cancel" else 0)
    assert EXPECTED[name] in output


@pytest.mark.parametrize("name", ["native_sse", "ndjson"])
async def test_a_script_prints_a_log_that_keeps_every_guarantee(name: str) -> None:
    assert verify(parse_log((await run_script(name)).encode())) == []


async def test_the_cancelled_stream_is_told_to_the_end() -> None:
    usage, end = map(json.loads, (await run_script("cancel", speed=0.5)).splitlines())
    assert (usage["type"], usage["final"]) == ("usage", True)
    assert (end["type"], end["status"]) == ("stream.end", "cancelled")


# --- examples/openai_client.py ------------------------------------------------------------------------


async def test_an_openai_script_runs_unchanged() -> None:
    async with stage() as url:
        ran = await run(sys.executable, str(EXAMPLES / "openai_client.py"), OPENAI_BASE_URL=f"{url}/v1")
    assert (ran.status, ran.errors) == (0, "")
    assert "Hello! How can I help you today?" in ran.output
    assert "finish: stop" in ran.output


async def test_an_openai_script_sees_reasoning_and_calls() -> None:
    tour = [recording for recording in load_recordings() if recording.name == "tour"]
    async with serving(make_app(tour, speed=0)) as engine, sidecar(engine) as running:
        ran = await run(sys.executable, str(EXAMPLES / "openai_client.py"), OPENAI_BASE_URL=f"{running.url}/v1")
    assert (ran.status, ran.errors) == (0, "")
    assert "reasoning: '\\nThe user says hi." in ran.output
    assert 'call: get_weather({"city": "Paris", "unit": "celsius"})' in ran.output
    assert "finish: tool_calls" in ran.output


def openai_blocks() -> list[Block]:
    found = [block for page in pages() for block in blocks(page) if block.language == "python"]
    return [block for block in found if "from openai import" in block.text]


@pytest.mark.parametrize("block", openai_blocks(), ids=lambda block: shown(block.page))
async def test_the_python_of_a_document_runs(block: Block) -> None:
    async with stage() as url:
        ran = await run(sys.executable, "-c", anchored(block.text, url.removeprefix("http://")))
    assert (ran.status, ran.errors) == (0, "")
    assert ran.output == "Hello! How can I help you today?"


# --- commands in the documents ------------------------------------------------------------------------


def typed_at_the_sidecar() -> list[tuple[str, str]]:
    """Every `curl` to port 8080 and every script of `examples/curl` that a document tells the reader to run."""
    found = [(page, line) for page in pages() if page not in ELSEWHERE for line in commands(page)]
    is_ours = re.compile(r"(curl .*(localhost|127\.0\.0\.1):8080)|examples/curl/\w+\.sh", re.DOTALL)
    return [(shown(page), line) for page, line in found if is_ours.match(line)]


@pytest.mark.parametrize(("page", "line"), typed_at_the_sidecar(), ids=lambda text: text[:60])
async def test_a_command_of_a_document_runs(page: str, line: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    async with stage(0.5 if "cancel" in line else 0) as url:
        command = f"cd {tmp_path} && {anchored(line, url.removeprefix('http://'))}"
        ran = await run("sh", "-c", command, URL=url, KEY="none")
    assert ran.status == 0, f"{page}: {line}\n{ran.errors}"
    if '"continue"' in line:  # the stream of the example is nobody's here
        assert '"code":"no_such_stream"' in ran.output
        return
    assert "stream.end" in printed(ran, tmp_path) or '"last_seq"' in ran.output


def prepare(folder: Path) -> None:
    """What a reader would have lying there."""
    (folder / "request.json").write_text('{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}')


def anchored(line: str, address: str) -> str:
    """The line for another address and another working folder."""
    return re.sub(r"(localhost|127\.0\.0\.1):8080", address, line).replace("examples/curl/", f"{EXAMPLES}/curl/")


def printed(ran: Ran, folder: Path) -> str:
    """What the command wrote, to its output or to a file."""
    return ran.output + "".join(path.read_text() for path in folder.glob("stream.*"))
