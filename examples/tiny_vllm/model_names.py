"""One engine, two ways to stream: the model's name in the request says which.

Served as "tiny", vLLM hands on raw text with `<think>` and `<tool_call>` in it, as an engine started without
parsers does. Served as "tiny-parsed", the same engine splits reasoning and tool calls by its own parsers, as
one started with `--reasoning-parser` and `--tool-call-parser` does. vLLM has no switch for that in a request,
and a second engine would cost memory and half a minute. Loaded by `--middleware model_names.ParsersByName`.
"""

from __future__ import annotations

import copy
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

PARSED = "tiny-parsed"


class ChatByName:
    """Stands where vLLM's routes look for their chat handler; everything but the parsers is shared."""

    def __init__(self, parsed: Any) -> None:
        self._parsed = parsed
        self._plain = without_parsers(parsed)

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        handler = self._parsed if request.model == PARSED else self._plain
        return await handler.create_chat_completion(request, raw_request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parsed, name)

    def __copy__(self) -> ChatByName:
        """As shallow as a copy of vLLM's own handler: what is then set on it is set for both models."""
        twin = object.__new__(ChatByName)
        twin.__dict__.update(_parsed=copy.copy(self._parsed), _plain=copy.copy(self._plain))
        return twin

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_parsed", "_plain"):
            self.__dict__[name] = value
        else:
            setattr(self._parsed, name, value)
            setattr(self._plain, name, value)


def without_parsers(parsed: Any) -> Any:
    """The handler that vLLM would have built if neither parser had been asked for."""
    plain = copy.copy(parsed)
    plain.parser_cls = None
    plain.enable_auto_tools = False
    plain._include_reasoning_tokens_details = False
    plain.online_renderer = copy.copy(parsed.online_renderer)
    plain.online_renderer.parser = None
    plain.online_renderer.enable_auto_tools = False
    return plain


class ParsersByName:
    """Puts `ChatByName` in place with the first request, when vLLM has built its own handler."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            state = scope["app"].state
            if not isinstance(state.openai_serving_chat, ChatByName):
                state.openai_serving_chat = ChatByName(state.openai_serving_chat)
        await self._app(scope, receive, send)
