"""Whose fault it was is the type; what to do about it is in the sentence.

Before the first byte a `Problem` is an HTTP answer, after it an event; every dialect spells both. A problem
is raised only where a caller waits for an answer (the shell); inside `core/` it travels as a value.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

CONTENT_FILTERED = "content_filtered"
"""The code of a halt. Dialects that have their own word for it, a finish reason, say that and no error."""

Origin = Literal["upstream", "proxy", "policy", "client"]


class Problem(Exception):
    """Something that ends a request.

    `status` is the HTTP status where the head was not sent yet, `code` a stable word for programs, `message`
    a sentence for people saying what was wrong and what to do, `retryable` whether the same request may
    succeed later. `engine_body` is the engine's own error answer, kept so that an OpenAI client sees exactly
    what the engine said.
    """

    origin: ClassVar[Origin] = "proxy"
    default_status: ClassVar[int] = 500
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        retryable: bool | None = None,
        param: str | None = None,
        engine_body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = self.default_status if status is None else status
        self.retryable = self.default_retryable if retryable is None else retryable
        self.param = param
        self.engine_body = engine_body
        self.headers = dict(headers or {})


class CallerError(Problem):
    """The request cannot be served as it is; the caller must change it."""

    origin = "client"
    default_status = 400


class EngineError(Problem):
    """The engine refused, failed, vanished or said something that is not its protocol."""

    origin = "upstream"
    default_status = 502
    default_retryable = True


class LimitReached(Problem):
    """A cap of this deployment ended the stream (bytes, seconds, line size)."""

    default_status = 413


class Overloaded(Problem):
    """Not now: draining or full; the same request may succeed later or on another replica."""

    default_status = 503
    default_retryable = True


class PolicyError(Problem):
    """A rule or a classifier of this deployment forbids the answer."""

    origin = "policy"
    default_status = 403


class OurBug(Problem):
    """Penstock itself failed; the log has the traceback under the stream's id."""

    default_retryable = True
