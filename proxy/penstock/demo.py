"""`penstock demo`: one stream, shown in the terminal as its events arrive."""

import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import aiohttp

from penstock import app
from penstock.core.recording import Recording
from penstock.settings import Listen, Settings, Upstream
from penstock.shell.replay import load_recordings, make_app, serving

_TOUR = "tour"
# A vLLM that runs the tour's script (examples/tiny_vllm) serves its model under this name.
_SCRIPTED_MODEL = "tiny"

_DIM, _BOLD, _CYAN, _YELLOW, _GREEN, _RED, _PLAIN = (
    "\x1b[2m", "\x1b[1m", "\x1b[36m", "\x1b[33m", "\x1b[32m", "\x1b[31m", "\x1b[0m"
)  # fmt: skip


async def show(upstream: str | None) -> int:
    """Streams one answer of `upstream`, or of an embedded engine that replays a recorded vLLM; 0 if it completed."""
    async with AsyncExitStack() as stack:
        tour = next(recording for recording in load_recordings() if recording.name == _TOUR)
        engine = upstream or await stack.enter_async_context(serving(make_app([tour])))
        # The tour writes its tool call into the text, as vLLM without a tool parser does.
        settings = Settings(listen=Listen(port=0), upstreams=[Upstream(url=engine, parses_tools=False)])
        _, url = await stack.enter_async_context(app.running(settings))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        async with session.get(f"{url}/v1/models") as models:
            if models.status != 200:
                print(f"{_RED}{models.status}{_PLAIN} {await models.text()}")
                return 1
            model = (await models.json())["data"][0]["id"]
        kind = "vLLM" if upstream else f"an embedded engine that replays {tour.engine} with its timing"
        print(f"{_DIM}{url} in front of {kind}, model {model}{_PLAIN}\n")
        screen = _Screen()
        request = _request(tour, model)
        if upstream and model == _SCRIPTED_MODEL:
            request |= await _script(session, upstream, tour)
        async with session.post(f"{url}/v1/streams", json=request) as answer:
            if answer.status != 200:
                print(f"{_RED}{answer.status}{_PLAIN} {await answer.text()}")
                return 1
            async for line in answer.content:
                if line.startswith(b"data: "):
                    screen.show(json.loads(line[6:]))
        print(_what_next(model))
        return 0 if screen.status == "completed" else 1


def _request(tour: Recording, model: str) -> dict[str, Any]:
    """The tour's own request, as a caller would write it; Penstock adds what the engine needs."""
    ours = ("tool_choice", "stream", "stream_options", "vllm_xargs")
    return {**{key: value for key, value in tour.request.items() if key not in ours}, "model": model}


async def _script(session: aiohttp.ClientSession, engine: str, tour: Recording) -> dict[str, Any]:
    """Makes the tiny model, which has random weights, say the tour's text; nothing for another engine of that name."""
    text = tour.said[0] + "<|im_end|>"
    body = {"model": _SCRIPTED_MODEL, "prompt": text, "add_special_tokens": False}
    async with session.post(f"{engine}/tokenize", json=body) as answer:
        if answer.status != 200:
            return {}
        return {"vllm_xargs": {"script": (await answer.json())["tokens"], "script_pause_ms": 25}}


def _what_next(model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]})
    return (
        f"\nNext: {_BOLD}penstock serve --upstream http://your-vllm:8000{_PLAIN}, then "
        f"curl -N localhost:8080/v1/streams -d '{body}'"
    )


class _Screen:
    """Prints events as people read them: thought dim, answer plain, calls and counts set apart."""

    def __init__(self) -> None:
        self.status = "running"

    def show(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "reasoning.start":
                self._write(f"{_CYAN}reasoning{_PLAIN}  {_DIM}")
            case "text.start":
                self._write(f"{_GREEN}answer{_PLAIN}     ")
            case "delta.reasoning" | "delta.text":
                self._write(event["text"].replace("\n", "\n           "))
            case "reasoning.end" | "text.end":
                self._write(f"{_PLAIN}\n")
            case "tool_call.start":
                self._write(f"{_YELLOW}tool call{_PLAIN}  {event['name']} {_DIM}")
            case "tool_call.arguments_chunk":
                self._write(event["text"])
            case "tool_call.ready":
                self._write(
                    f"{_PLAIN}\n{_YELLOW}ready{_PLAIN}      {event['name']}({_arguments(event['arguments'])})\n"
                )
            case "finish":
                self._write(f"{_DIM}finish     {event['reason']} ({event['cause']}){_PLAIN}\n")
            case "usage" if event["final"]:
                self._usage(event)
            case "error":
                self._write(f"{_PLAIN}\n{_RED}error{_PLAIN}      {event['code']}: {event['message']}\n")
            case "stream.end":
                self.status = event["status"]
                told = f"{event['events']} events in {event['duration_ms']} ms, first text after {event['ttft_ms']} ms"
                self._write(f"{_DIM}end        {event['status']}, {told}{_PLAIN}\n")

    def _usage(self, event: dict[str, Any]) -> None:
        names = ("prompt_tokens", "reasoning_tokens", "answer_tokens", "tool_tokens", "completion_tokens")
        counts = ", ".join(f"{event[name]} {name.removesuffix('_tokens')}" for name in names)
        self._write(f"{_DIM}usage      {counts} tokens{_PLAIN}\n")

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
