"""The hook on vLLM's output processor, and the only file that knows the classes it reads.

`OutputProcessor.process_outputs` sees every engine step in one call, in the API server's own event loop. The tap
tells the open streams what the step brought and then lets vLLM do its work. It looks at what vLLM has before it
hooks itself in, and an error of its own ends the stream it concerns, never the step.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from penstock_vllm.end_counter import Count, count_step, counter, nobody
from penstock_vllm.frames import Cause
from penstock_vllm.streams import Choice, OpenStreams, Stream

_log = logging.getLogger("vllm.penstock")

# One hook in a process, so one registry.
OPEN_STREAMS: Final = OpenStreams()

# The model's own end tokens, told by the routes when vLLM starts: any other that ended a request is the request's own.
MODEL_ENDS: Final[set[int]] = set()

_MARK = "_penstock_tap"
_OUTPUT_FIELDS = {"request_id", "new_token_ids", "finish_reason", "stop_reason", "prefill_stats"}
_STATE_FIELDS = {"external_req_id", "request_index", "prompt_token_ids", "prompt_len"}

# As vLLM words it on its own routes.
_ENGINE_ERROR = {
    "error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}
}
_OUR_ERROR = {
    "error": {
        "message": "Penstock's output tap failed on this stream; the engine's log says why",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
}
_CAUSES = {
    "length": Cause.MAX_TOKENS,
    "abort": Cause.ABORT,
    "error": Cause.ERROR,
    "repetition": Cause.REPETITION,
}


def install() -> str | None:
    """Hooks the tap into this process's vLLM, once. Returns why not, where this vLLM is not as it must be."""
    try:
        from vllm.v1.engine import EngineCoreOutput
        from vllm.v1.engine.output_processor import OutputProcessor, RequestState

        return install_on(OutputProcessor, EngineCoreOutput, RequestState, count=counter())
    except Exception as error:
        return f"this vLLM's output processor is not what this plugin knows: {type(error).__name__}: {error}"


def install_on(
    processor: Any, output: Any, state: Any, streams: OpenStreams = OPEN_STREAMS, count: Count = nobody
) -> str | None:
    """`install`, on given classes. A second time changes nothing."""
    original: Any = getattr(processor, "process_outputs", None)
    if getattr(original, _MARK, False):
        return None
    if problem := _misfit(original, processor, output, state):
        return problem
    hooked = _tapped(original, streams, count)
    setattr(processor, "process_outputs", hooked)  # noqa: B010  # mypy: a method is replaced
    if callable(getattr(processor, "abort_requests", None)):
        setattr(processor, "abort_requests", _counting_aborts(processor.abort_requests, count))  # noqa: B010
    return None


def _misfit(original: Any, processor: Any, output: Any, state: Any) -> str | None:
    if not callable(original):
        return "OutputProcessor has no process_outputs"
    names = list(inspect.signature(original).parameters)[:2]
    if names != ["self", "engine_core_outputs"] or inspect.iscoroutinefunction(original):
        return f"OutputProcessor.process_outputs takes {names} and is not what this plugin knows"
    if missing := sorted(_OUTPUT_FIELDS - set(getattr(output, "__struct_fields__", ()))):
        return f"EngineCoreOutput has no {', '.join(missing)}"
    if missing := sorted(_STATE_FIELDS - _assigned(state)):
        return f"RequestState has no {', '.join(missing)}"
    if "request_states" not in _assigned(processor):
        return "OutputProcessor has no request_states"
    return None


def _assigned(owner: Any) -> set[str]:
    """The names that a class's constructor uses, its attributes among them."""
    code = getattr(owner.__init__, "__code__", None)
    return set(code.co_names) if code is not None else set()


def _tapped(original: Callable[..., Any], streams: OpenStreams, count: Count) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if streams:
            try:
                observe(streams, self.request_states, engine_core_outputs)
            except Exception:
                _log.exception("penstock: the output tap failed on an engine step; its streams end with an error")
                streams.fail_all(500, _OUR_ERROR)
        causes = _causes(self.request_states, engine_core_outputs)
        result = original(self, engine_core_outputs, *args, **kwargs)
        count_step(count, causes, result)
        return result

    setattr(process_outputs, _MARK, True)
    return process_outputs


def _causes(states: Mapping[str, Any], outputs: Iterable[Any]) -> list[str]:
    """Of what ends in this step and is still known here. What cannot be read is not counted."""
    try:
        ended = [output for output in outputs if output.finish_reason is not None and output.request_id in states]
        return [_cause_name(output) for output in ended]
    except Exception:
        return []


def _cause_name(output: Any) -> str:
    stop = output.stop_reason
    own = () if stop in MODEL_ENDS else (stop,)
    return cause_of(str(output.finish_reason), stop, own).name.lower()


def _counting_aborts(original: Callable[..., Any], count: Count) -> Callable[..., Any]:
    """Whoever leaves is forgotten here first: what the engine says of its request later is not heard."""

    @functools.wraps(original)
    def abort_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = len(self.request_states)
        aborted = original(self, *args, **kwargs)
        if gone := before - len(self.request_states):
            count("abort", gone)
        return aborted

    return abort_requests


def observe(streams: OpenStreams, states: Mapping[str, Any], outputs: Iterable[Any]) -> None:
    """Tells the open streams what an engine step brought."""
    choices = streams.choices
    for output in outputs:
        choice = choices.get(output.request_id)
        if choice is None:
            # Somebody else's request, most often; or one of ours of which the engine speaks for the first time.
            state = states.get(output.request_id)
            stream = streams.of_request(state.external_req_id) if state is not None else None
            if stream is not None and not stream.is_over:
                _guarded(stream, _join, streams, stream, state, output)
        elif output.finish_reason is None:
            if output.new_token_ids:
                _guarded(choice.stream, choice.tokens, output.new_token_ids)
        else:
            _guarded(choice.stream, _finish, choice, output)
    streams.commit()


def _guarded(stream: Stream, tell: Callable[..., None], *arguments: Any) -> None:
    try:
        tell(*arguments)
    except Exception:
        _log.exception("penstock: the output tap failed on a stream, which ends with an error")
        stream.fail(500, _OUR_ERROR)


def _join(streams: OpenStreams, stream: Stream, state: Any, output: Any) -> None:
    if not stream.has_begun:
        if _failed(output):
            stream.fail(500, _ENGINE_ERROR)
            return
        stats = output.prefill_stats
        cached = stats.num_cached_tokens if stats is not None else 0
        stream.begin(state.prompt_token_ids or (), state.prompt_len, cached)
    choice = streams.join(output.request_id, stream, state.request_index)
    if output.finish_reason is not None:
        _finish(choice, output)
    elif output.new_token_ids:
        choice.tokens(output.new_token_ids)


def _finish(choice: Choice, output: Any) -> None:
    if _failed(output):
        choice.last_tokens(output.new_token_ids)
        choice.stream.fail(500, _ENGINE_ERROR)
        return
    reason = str(output.finish_reason)
    cause = cause_of(reason, output.stop_reason, choice.stream.own_stop_ids)
    choice.finish(output.new_token_ids, cause, reason, output.stop_reason)


def cause_of(reason: str, stop: int | str | None, own_stop_ids: Iterable[int | str | None] = ()) -> Cause:
    """vLLM's finish reason and stop reason as one cause.

    A model may have several end tokens: vLLM names all but the first as if the request had asked to stop there.
    """
    if reason != "stop":
        return _CAUSES.get(reason, Cause.UNKNOWN)
    if stop is None:
        return Cause.EOS
    if isinstance(stop, int):
        return Cause.STOP_TOKEN if stop in own_stop_ids else Cause.EOS
    return Cause.GRAMMAR if stop == "grammar" else Cause.STOP_STRING


def _failed(output: Any) -> bool:
    return output.finish_reason is not None and str(output.finish_reason) == "error"
