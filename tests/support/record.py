"""Record what the real engine answers, as JSON Lines: one file per exchange.

    .venv/bin/python tests/support/record.py [NAME …]

starts the engine and records the named exchanges of `EXCHANGES`, all of them by default: to
`tests/vectors/vllm-<version>/`, and those in `DEMO` to `proxy/penstock/recordings/`.

The first line holds the request as a client would send it; the script that made the model speak is left out,
and `said` holds its text instead, per choice: what was generated before vLLM cut stop strings or parsed.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.engine import ROOT, Engine, running_engine

Json = dict[str, Any]

READ_BYTES = 65536
READ_SECONDS = 60

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time in a city, now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}

PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>'
TOKYO = '<tool_call>\n{"name": "get_time", "arguments": {"city": "東京"}}\n</tool_call>'
EMOJI = "<think>\nA family 👨‍👩‍👧‍👦, hm.\n</think>\n\nHere: 👩‍👩‍👧 🇫🇷🇯🇵 你好，世界 e\u0301 👍🏽!"
THINKING = "<think>\nThe user says hi.\n</think>\n\nHello! How can I help?"
THINKING_TOOL = f"<think>\nI need the weather.\n</think>\n\nOne moment.\n{PARIS}"
TOUR = (
    "<think>\nThe user says hi. A short greeting is enough, "
    "and the weather in Paris would be nice 🤔 to have.\n</think>\n\n"
    "Hello! 👩‍👩‍👧 你好，世界！ Let me look up the weather in Paris for you.\n" + PARIS
)


@dataclass(frozen=True, slots=True)
class Exchange:
    about: str
    said: tuple[str, ...] = ()
    """What the model is made to say, one text per choice. Bytes that are no text are lone surrogates."""
    ask: Json = field(default_factory=dict)
    """Fields of the request besides the model and the messages."""
    parsed: bool = False
    """Whether vLLM's own reasoning and tool parsers are on."""
    eos: bool = True
    bytewise: bool = False
    """Whether every byte is a token of its own, markers excepted."""
    pause_ms: float = 3
    stream: bool = True
    meanwhile: Callable[[Engine], None] | None = None
    """What happens to the engine once five pieces of the answer have come."""


def tools(*offered: Json) -> Json:
    return {"tools": list(offered)}


USAGE = {"stream_options": {"include_usage": True}}
CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
LONG = " ".join(f"word{i}" for i in range(2000))

JSON_PLACE = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "place",
            "schema": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    },
    "chat_template_kwargs": {"enable_thinking": False},
}

# Without a tool parser vLLM refuses tool_choice "auto", the default, so plain requests with tools say "none".
INLINE = {"tool_choice": "none"}

EXCHANGES: dict[str, Exchange] = {
    "plain": Exchange("A short answer.", ("Hello! How can I help?",), USAGE),
    "no-usage": Exchange("No usage was asked for.", ("Hello! How can I help?",)),
    "thinking": Exchange("Reasoning, then an answer, as raw text.", (THINKING,), USAGE),
    "thinking-parsed": Exchange("Reasoning split off by vLLM.", (THINKING,), USAGE, parsed=True),
    "emoji": Exchange(
        "Joined emoji, flags, CJK, a combining accent, and every byte its own token.",
        (EMOJI,),
        USAGE,
        bytewise=True,
    ),
    "emoji-parsed": Exchange(
        "The same through vLLM's reasoning parser: no chunk for half a character.",
        (EMOJI,),
        USAGE,
        parsed=True,
        bytewise=True,
    ),
    "thinking-unclosed": Exchange(
        "max_tokens ends the answer within the reasoning.",
        ("<think>\nLet me think about that for a moment, and then",),
        {"max_tokens": 8, **USAGE},
    ),
    "thinking-unclosed-parsed": Exchange(
        "max_tokens ends the answer within the reasoning that vLLM splits off.",
        ("<think>\nLet me think about that for a moment, and then",),
        {"max_tokens": 8, **USAGE},
        parsed=True,
    ),
    "thinking-opened-by-prompt": Exchange(
        "The prompt ends with <think>, so the model's first token is reasoning and no marker opens it.",
        ("The user says hi.\n</think>\n\nHello!",),
        {"chat_template_kwargs": {"open_think": True}, **USAGE},
    ),
    "thinking-opened-by-prompt-parsed": Exchange(
        "The same through vLLM's reasoning parser.",
        ("The user says hi.\n</think>\n\nHello!",),
        {"chat_template_kwargs": {"open_think": True}, **USAGE},
        parsed=True,
    ),
    "thinking-off-parsed": Exchange(
        "enable_thinking false: vLLM's parser takes all for the answer.",
        ("Hello! How can I help?",),
        {"chat_template_kwargs": {"enable_thinking": False}, **USAGE},
        parsed=True,
    ),
    "thinking-absent-parsed": Exchange(
        "A model that never opens <think>: vLLM's parser takes all for reasoning.",
        ("Hello! How can I help?",),
        USAGE,
        parsed=True,
    ),
    "tool": Exchange("One tool call as raw text.", (PARIS,), tools(WEATHER) | INLINE | USAGE),
    "tool-parsed": Exchange("One tool call by vLLM.", (PARIS,), tools(WEATHER) | USAGE, parsed=True),
    "tools": Exchange("Two tool calls as raw text.", (f"{PARIS}\n{TOKYO}",), tools(WEATHER, CLOCK) | INLINE | USAGE),
    "tools-parsed": Exchange(
        "Two tool calls by vLLM.", (f"{PARIS}\n{TOKYO}",), tools(WEATHER, CLOCK) | USAGE, parsed=True
    ),
    "thinking-tool": Exchange(
        "Reasoning, answer and tool call as raw text.", (THINKING_TOOL,), tools(WEATHER) | INLINE | USAGE
    ),
    "thinking-tool-parsed": Exchange(
        "Reasoning, answer and tool call by vLLM.", (THINKING_TOOL,), tools(WEATHER) | USAGE, parsed=True
    ),
    "tool-cut": Exchange(
        "max_tokens ends the answer within the arguments.",
        (PARIS,),
        {"max_tokens": 13, **tools(WEATHER), **INLINE, **USAGE},
    ),
    "tool-cut-parsed": Exchange(
        "max_tokens ends the answer within the arguments that vLLM parses.",
        (f"<think>\n\n</think>\n\n{PARIS}",),
        {"max_tokens": 18, **tools(WEATHER), **USAGE},
        parsed=True,
    ),
    "tool-broken-parsed": Exchange(
        "Arguments that are no JSON, through vLLM's parser.",
        ('<think>\n\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}\n</tool_call>',),
        tools(WEATHER) | USAGE,
        parsed=True,
    ),
    "tool-required-parsed": Exchange(
        'tool_choice "required": vLLM forces the shape by a grammar.',
        (f"<think>\n\n</think>{PARIS}",),
        {"tool_choice": "required", **tools(WEATHER), **USAGE},
        parsed=True,
    ),
    "tool-named-parsed": Exchange(
        'tool_choice names the tool: vLLM forces the shape and finishes with "stop".',
        (f"<think>\n\n</think>{PARIS}",),
        {
            "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            **tools(WEATHER),
            **USAGE,
        },
        parsed=True,
    ),
    "choices": Exchange(
        "Two choices of different length.",
        (THINKING, "<think>\nHm.\n</think>\n\nHi 👧!"),
        {"n": 2, "seed": 0, "temperature": 1, **USAGE},
    ),
    "choices-parsed": Exchange(
        "Two choices through vLLM's parsers, one of them a tool call.",
        (THINKING, f"<think>\nHm.\n</think>\n\n{PARIS}"),
        {"n": 2, "seed": 0, "temperature": 1, **tools(WEATHER), **USAGE},
        parsed=True,
    ),
    "choices-continuous-usage": Exchange(
        "Two choices with usage on every chunk.",
        (THINKING, "Hi 👧!"),
        {"n": 2, "seed": 0, "temperature": 1, **CONTINUOUS},
    ),
    "continuous-usage": Exchange("Usage on every chunk.", (THINKING,), CONTINUOUS),
    "continuous-usage-parsed": Exchange(
        "Usage on every chunk, reasoning tokens counted by vLLM.", (THINKING,), CONTINUOUS, parsed=True
    ),
    "logprobs": Exchange(
        "Two alternatives for each token.", ("Hi 👧!",), {"logprobs": True, "top_logprobs": 2, **USAGE}
    ),
    "logprobs-parsed": Exchange(
        "Two alternatives for each token, through vLLM's parser.",
        ("<think>\nHm 👧.\n</think>\n\nHi!",),
        {"logprobs": True, "top_logprobs": 2, **USAGE},
        parsed=True,
    ),
    "token-ids": Exchange("Token ids beside the text.", (THINKING,), {"return_token_ids": True, **USAGE}),
    "token-ids-parsed": Exchange(
        "Token ids beside what vLLM's parsers make of them.",
        (THINKING_TOOL,),
        {"return_token_ids": True, **tools(WEATHER), **USAGE},
        parsed=True,
    ),
    "stop-string": Exchange(
        "A stop string spread over several tokens is cut off.",
        ("One two three END four five six",),
        {"stop": ["three END"], **USAGE},
        bytewise=True,
    ),
    "stop-string-included": Exchange(
        "A stop string that the client wants to see.",
        ("One two three END four five six",),
        {"stop": ["three END"], "include_stop_str_in_output": True, **USAGE},
        bytewise=True,
    ),
    "stop-string-within-token": Exchange(
        "The stop string ends in the middle of a token.",
        ("The weather in Paris is sunny",),
        {"stop": ["weat"], **USAGE},
    ),
    "cut-emoji": Exchange(
        "max_tokens ends the answer within a character: 2 of its 4 bytes.",
        ("Hi 👧!",),
        {"max_tokens": 5, **USAGE},
        bytewise=True,
    ),
    "cut-emoji-parsed": Exchange(
        "The same through vLLM's parser.",
        ("<think>\n\n</think>\n\nHi 👧!",),
        {"max_tokens": 11, **USAGE},
        parsed=True,
        bytewise=True,
    ),
    "broken-bytes": Exchange(
        "Half a character and a lone continuation byte within text: U+FFFD comes one token late.",
        ("Hi \udcf0\udc9f again \udcbf!",),
        USAGE,
        bytewise=True,
    ),
    "special-tokens": Exchange(
        "The client wants to see special tokens.",
        ("Hello!",),
        {"skip_special_tokens": False, **USAGE},
    ),
    "merged": Exchange(
        "Four tokens a chunk, so that markers stand in the middle of a piece.",
        (THINKING_TOOL,),
        {"stream_interval": 4, **tools(WEATHER), **INLINE, **USAGE},
    ),
    "merged-parsed": Exchange(
        "Four tokens a chunk through vLLM's parsers.",
        (THINKING_TOOL,),
        {"stream_interval": 4, **tools(WEATHER), **USAGE},
        parsed=True,
    ),
    "repetition": Exchange(
        "vLLM stops a model that repeats itself.",
        ("ha " * 40,),
        {"repetition_detection": {"max_pattern_size": 4, "min_count": 6}, **USAGE},
        eos=False,
    ),
    "structured": Exchange(
        "An answer under a JSON schema.",
        ('{"city": "Paris"}',),
        {**JSON_PLACE, **USAGE},
    ),
    "whole": Exchange("Not streamed.", ("Hello! How can I help?",), stream=False),
    "whole-choices": Exchange(
        "Two choices, not streamed.",
        (THINKING, "Hi 👧!"),
        {"n": 2, "seed": 0, "temperature": 1},
        stream=False,
    ),
    "whole-tool": Exchange(
        "A tool call as raw text, not streamed.", (THINKING_TOOL,), tools(WEATHER) | INLINE, stream=False
    ),
    "whole-tool-parsed": Exchange(
        "A tool call by vLLM, not streamed.", (THINKING_TOOL,), tools(WEATHER), parsed=True, stream=False
    ),
    "whole-tools-parsed": Exchange(
        "Two tool calls by vLLM, not streamed.",
        (f"<think>\n\n</think>\n\n{PARIS}\n{TOKYO}",),
        tools(WEATHER, CLOCK),
        parsed=True,
        stream=False,
    ),
    "whole-logprobs": Exchange(
        "Log probabilities, not streamed.", ("Hi 👧!",), {"logprobs": True, "top_logprobs": 2}, stream=False
    ),
    "error-bad-request": Exchange("A temperature that cannot be: 400.", (), {"temperature": -1}),
    "error-unknown-model": Exchange("A model that is not served: 404.", (), {"model": "gpt-none"}),
    "error-context": Exchange(
        "A prompt longer than the context: 400.", (), {"messages": [{"role": "user", "content": LONG}]}
    ),
    "error-no-tool-parser": Exchange("Tools for an engine without tool parser: 400.", (), tools(WEATHER)),
    "error-grammar": Exchange(
        "A grammar that cannot be compiled: 200, then an error frame.",
        ("Hello!",),
        {"structured_outputs": {"grammar": "root ::= ("}, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "error-midway": Exchange(
        "A token that the grammar forbids, after some that it allows: an error frame within the answer.",
        ('{"city": "Paris" nonsense',),
        {**JSON_PLACE, **USAGE},
    ),
    "error-midway-parsed": Exchange(
        "The same after reasoning that vLLM split off.",
        ('<think>\nHm.\n</think>\n\n{"city": "Paris" nonsense',),
        {**JSON_PLACE, "chat_template_kwargs": {}, **USAGE},
        parsed=True,
    ),
    "error-engine-dies": Exchange(
        "The engine core dies in the middle of the answer.",
        (THINKING * 4,),
        USAGE,
        pause_ms=25,
        meanwhile=Engine.kill_core,
    ),
}

DEMO: dict[str, Exchange] = {
    "hello": Exchange("A short answer.", ("Hello! How can I help you today?",), CONTINUOUS, pause_ms=22),
    "hello-whole": Exchange(
        "The same, not streamed.", ("Hello! How can I help you today?",), stream=False, pause_ms=22
    ),
    "tour": Exchange(
        "Reasoning, an answer with emoji and CJK, and a tool call, as raw text of the model.",
        (TOUR,),
        {**tools(WEATHER), **INLINE, **CONTINUOUS},
        pause_ms=22,
    ),
}


def request_of(exchange: Exchange) -> Json:
    """The request as a client would send it."""
    request: Json = {
        "model": Engine.parsed_model if exchange.parsed else Engine.model,
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
        "max_tokens": 512,
    }
    if exchange.stream:
        request["stream"] = True
    return request | exchange.ask


def script_of(exchange: Exchange, engine: Engine) -> Json:
    """What the request carries besides, so that the model says what it is to say."""
    scripts = [engine.script(text, eos=exchange.eos, bytewise=exchange.bytewise) for text in exchange.said]
    if not scripts:
        return {}
    more = {f"script_{i}": script for i, script in enumerate(scripts) if i}
    return {"vllm_xargs": {"script": scripts[0], **more, "script_pause_ms": exchange.pause_ms}}


def record(engine: Engine, name: str, exchange: Exchange, version: str) -> Iterator[Json]:
    """Perform the exchange; the lines of its recording."""
    request = request_of(exchange)
    address = urlsplit(engine.url)
    connection = HTTPConnection(address.hostname or "", address.port, timeout=READ_SECONDS)
    body = json.dumps(request | script_of(exchange, engine))
    started = time.monotonic()
    connection.request(
        "POST",
        "/v1/chat/completions",
        body,
        {"Content-Type": "application/json", "X-Request-Id": name},
    )
    response = connection.getresponse()
    yield {
        "recording": 1,
        "name": name,
        "engine": f"vllm {version} (cpu)",
        "about": exchange.about,
        "said": [text.encode(errors="surrogateescape").decode(errors="replace") for text in exchange.said],
        "request": request,
        "status": response.status,
        "content_type": response.getheader("Content-Type"),
    }
    for count, (piece, at) in enumerate(pieces(response), start=1):
        if count == 5 and exchange.meanwhile:
            exchange.meanwhile(engine)
        yield {"ms": round((at - started) * 1000, 1), **spelled(piece)}
    connection.close()


def pieces(response: HTTPResponse) -> Iterator[tuple[bytes, float]]:
    """Each network read with the time it came. A connection that breaks ends the pieces."""
    try:
        while piece := response.read1(READ_BYTES):
            yield piece, time.monotonic()
    except (IncompleteRead, ConnectionError):
        return


def spelled(piece: bytes) -> Json:
    try:
        return {"text": piece.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(piece).decode()}


def write(directory: Path, name: str, lines: Iterator[Json]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{name}: {text.count(chr(10)) - 1} reads")


def main(names: list[str]) -> None:
    unknown = set(names) - EXCHANGES.keys() - DEMO.keys()
    if unknown:
        sys.exit(f"no such exchange: {', '.join(sorted(unknown))}")
    with running_engine() as engine:
        version = engine.version()
        vectors = ROOT / "tests" / "vectors" / f"vllm-{version.rpartition('.')[0]}"
        for directory, exchanges in (
            (ROOT / "proxy" / "penstock" / "recordings", DEMO),
            (vectors, EXCHANGES),
        ):
            # What harms the engine comes last.
            for name, exchange in sorted(exchanges.items(), key=lambda item: item[1].meanwhile is not None):
                if not names or name in names:
                    write(directory, name, record(engine, name, exchange, version))


if __name__ == "__main__":
    main(sys.argv[1:])
