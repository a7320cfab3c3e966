"""Requests that make the real engine say given texts."""

from typing import Any

from support.engine import Engine

Json = dict[str, Any]


class Script:
    """`script("Hi!", pause_ms=5)` are fields for a chat request, after which the engine says just that."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self, *texts: str, eos: bool = True, bytewise: bool = False, pause_ms: float = 0, **fields: Any
    ) -> Json:
        """One text per choice; `bytewise` makes every byte a token. `fields` are more fields of the request."""
        ids = [self._engine.script(text, eos=eos, bytewise=bytewise) for text in texts]
        more = {f"script_{choice}": said for choice, said in enumerate(ids) if choice}
        several = {"n": len(ids), "seed": 0, "temperature": 1} if len(ids) > 1 else {}
        xargs = {"script": ids[0], **more, **({"script_pause_ms": pause_ms} if pause_ms else {})}
        return {**several, "vllm_xargs": xargs, **fields}
