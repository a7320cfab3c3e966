"""Ends a structured answer where its value ends: the hook on vLLM's scheduler.

In the step that brings the last token of the value, when the grammar accepts and nothing but white space could
follow, the request is finished with the stop reason "grammar", without a forward pass for an end token. The rule, and
what breaks it, stand in `docs/explanation/grammar_stop.md`. Loaded in every process of vLLM; works in the engine's.
"""

import functools
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

from penstock_vllm import notations
from penstock_vllm.language import Machine, Reading, UnclearError
from penstock_vllm.vocabulary import TokenizerVocabulary, fast_tokenizer
from penstock_vllm.white_space import white_space_tokens

_log = logging.getLogger("vllm.penstock")

SETTING: Final = "PENSTOCK_GRAMMAR_STOP"
REQUEST_SETTING: Final = "grammar_stop"
STOP_REASON: Final = "grammar"

_MARK: Final = "_penstock_grammar_stop"
_WATCH: Final = "_penstock_watch"
_STATE: Final = "_penstock_value"
_ENDS: Final = "_penstock_ends"

# These are written as text: only in them can white space be all that is left without being part of the value.
_WRITTEN: Final = {"REGEX": notations.regular_expression, "GRAMMAR": notations.grammar}


def install() -> str | None:
    """Hooks this process's scheduler, once. Returns why not, where this vLLM is not as it must be."""
    setting = os.environ.get(SETTING, "on")
    if setting != "on":
        return f"{SETTING} is {setting}" if setting == "off" else f"{SETTING} is {setting!r}; it must be on or off"
    try:
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager

        return install_on(Scheduler, StructuredOutputManager)
    except Exception as error:
        return f"this vLLM's scheduler is not what this plugin knows: {type(error).__name__}: {error}"


def install_on(scheduler: Any, manager: Any) -> str | None:
    """`install`, on given classes. A second time changes nothing."""
    add: Any = getattr(scheduler, "add_request", None)
    if getattr(add, _MARK, False):
        return None
    accept: Any = getattr(manager, "accept_tokens", None)
    if accept is None:
        return "StructuredOutputManager has no accept_tokens (vLLM 0.30 is the first that has)"
    update: Any = getattr(scheduler, "_update_request_with_output", None)
    for name, method, known in (
        ("Scheduler.add_request", add, ["self", "request"]),
        ("Scheduler._update_request_with_output", update, ["self", "request", "new_token_ids"]),
        ("StructuredOutputManager.accept_tokens", accept, ["self", "request", "new_token_ids"]),
    ):
        takes = list(inspect.signature(method).parameters)[: len(known)]
        if takes != known:
            return f"{name} takes {takes} and is not what this plugin knows"
    scheduler.add_request = _watching(add)
    manager.__init__ = _prepared(manager.__init__)
    return None


def _prepared(original: Callable[..., None]) -> Callable[..., None]:
    """The vocabulary is looked through when the engine starts: some 0.1 s, in which no request waits."""

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _ends_of(self)

    return initialise


def _watching(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        watch: Watch | None = self.__dict__.get(_WATCH)
        if watch is None:
            watch = Watch(self)
            setattr(self, _WATCH, watch)
        watch.sees(request)
        original(self, request, *args, **kwargs)

    setattr(add_request, _MARK, True)
    return add_request


class Watch:
    """Stands between a scheduler and its own methods while it has structured requests: free text alone pays nothing."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._structured: weakref.WeakSet[Any] = weakref.WeakSet()
        self._placed: list[tuple[Any, str, Any, Any]] = []
        """Object, name, our method, and what stood there on the object itself."""
        self.is_on = False

    def sees(self, request: Any) -> None:
        """Of each new request, before it is scheduled. That the last structured one has gone shows at the next one."""
        if getattr(request, "structured_output_request", None) is not None:
            self._structured.add(request)
        if self._structured and not self.is_on:
            self._enter()
        elif self.is_on and not self._structured:
            self._leave()

    def _enter(self) -> None:
        scheduler, manager = self._scheduler, self._scheduler.structured_output_manager
        update, accept = scheduler._update_request_with_output, manager.accept_tokens

        # On these two objects, not their classes: whoever else hooks those is heard as before.
        def update_request(request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
            if request.structured_output_request is None or not new_token_ids:
                return update(request, new_token_ids, *args, **kwargs)

            def append(ids: list[int]) -> tuple[list[int], bool]:
                appended: tuple[list[int], bool] = update(request, ids, *args, **kwargs)
                return appended

            return _step(scheduler, request, new_token_ids, append, lambda ids: accept(request, ids))

        def accept_tokens(request: Any, new_token_ids: list[int]) -> bool:
            """vLLM advances the grammar after each step; here that has been done."""
            value: _Value | None = request.__dict__.get(_STATE)
            if value is None or value.accepted is None:
                taken: bool = accept(request, new_token_ids)
                return taken
            accepted, value.accepted = value.accepted, None
            return accepted

        self._place(scheduler, "_update_request_with_output", update_request)
        self._place(manager, "accept_tokens", accept_tokens)
        self.is_on = True

    def _place(self, owner: Any, name: str, ours: Any) -> None:
        self._placed.append((owner, name, ours, owner.__dict__.get(name)))
        setattr(owner, name, ours)

    def _leave(self) -> None:
        """Takes out what is ours. Who has hooked the same since calls on through it: then both stay."""
        if any(owner.__dict__.get(name) is not ours for owner, name, ours, _ in self._placed):
            return
        for owner, name, _, before in self._placed:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._placed.clear()
        self.is_on = False


def _step(
    scheduler: Any,
    request: Any,
    new_token_ids: list[int],
    append: Callable[[list[int]], tuple[list[int], bool]],
    advance: Callable[[list[int]], bool],
) -> tuple[list[int], bool]:
    """One request's part of an engine step, a token at a time: speculation may bring more than the value has."""
    value = _value_of(scheduler, request)
    kept: list[int] = []
    for position, token in enumerate(new_token_ids):
        ids, stopped = append([token])
        kept += ids
        value.accepted = advance(ids)
        if stopped:
            value.name_cause(request)
            return kept, True
        if not value.accepted:
            rest, stopped = append(new_token_ids[position + 1 :])
            return kept + rest, stopped
        if value.is_over(request):
            return _end(scheduler, request, value, kept)
    return kept, False


def _end(scheduler: Any, request: Any, value: "_Value", kept: list[int]) -> tuple[list[int], bool]:
    if _needs_the_models_own_end(scheduler, request):
        value.is_ending = True
        structured = request.structured_output_request
        structured.grammar = OnlyTheEnd(structured.grammar, request.sampling_params.eos_token_id)
        return kept, False
    from vllm.v1.request import RequestStatus

    # vLLM takes the last token of a stopped request for its stop token and leaves it out of the text.
    end = request.sampling_params.eos_token_id
    request.append_output_token_ids(end)
    request.status = RequestStatus.FINISHED_STOPPED
    value.is_ending = True
    value.name_cause(request)
    return [*kept, end], True


def _needs_the_models_own_end(scheduler: Any, request: Any) -> bool:
    """Whether the answer tells about each token what only a forward pass knows."""
    parameters = request.sampling_params
    return (
        parameters.logprobs is not None
        or getattr(parameters, "num_logprobs", None) is not None
        or getattr(scheduler, "return_sampling_mask", False)
        or getattr(scheduler.vllm_config.model_config, "enable_return_routed_experts", False)
    )


def _value_of(scheduler: Any, request: Any) -> "_Value":
    value: _Value | None = request.__dict__.get(_STATE)
    if value is None:
        manager = scheduler.structured_output_manager
        value = _Value(_ends_of(manager), manager, request)
        setattr(request, _STATE, value)
    return value


def _ends_of(manager: Any) -> "Ends":
    ends: Ends | None = manager.__dict__.get(_ENDS)
    if ends is None:
        ends = Ends(getattr(manager, "tokenizer", None))
        setattr(manager, _ENDS, ends)
    return ends


class OnlyTheEnd:
    """Stands in a request's place for its grammar once the value is whole: only the end token is allowed."""

    def __init__(self, grammar: Any, end: int) -> None:
        self._grammar = grammar
        self._end = end

    def fill_bitmask(self, bitmask: Any, index: int) -> None:
        row = bitmask[index].numpy().view("uint32")
        row.fill(0)
        row[self._end // 32] = 1 << (self._end % 32)

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens[:1] if tokens[:1] == [self._end] else []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grammar, name)


class Ends:
    """What is known for all requests of an engine: which tokens are white space, and the grammars read lately."""

    def __init__(self, tokenizer: Any) -> None:
        fast = fast_tokenizer(tokenizer)
        self.vocabulary = None if fast is None else TokenizerVocabulary(fast)
        self._white: tuple[int, ...] = ()
        if self.vocabulary is None:
            _log.warning("penstock: this tokenizer has no fast form: a value is ended only where nothing may follow")
        else:
            tokens = white_space_tokens(self.vocabulary, fast.get_vocab(with_added_tokens=False))
            self._white = tokens.whole + tokens.fragments
        self._buffer: Any = None
        self.machine = functools.lru_cache(maxsize=128)(_machine)

    @functools.cached_property
    def _bits(self) -> Callable[[tuple[int, ...]], Any]:
        return functools.lru_cache(maxsize=128)(self._bits_of)

    def _bits_of(self, ids: tuple[int, ...]) -> Any:
        import numpy

        bits = numpy.zeros(self._buffer.shape[1], dtype=numpy.uint32)
        for number in ids:
            if number // 32 < len(bits):
                bits[number // 32] |= numpy.uint32(1 << (number % 32))
        return bits

    def left(self, backend: Any, grammar: Any, ends: tuple[int, ...]) -> tuple[str, int | None]:
        """What the grammar allows beside `ends`: "nothing", "white space" or "text", and a token of that."""
        if self._buffer is None:
            self._buffer = backend.allocate_token_bitmask(1)
        self._buffer.fill_(0)
        grammar.fill_bitmask(self._buffer, 0)
        row = self._buffer[0].numpy().view("uint32") & ~self._bits(ends)
        if not row.any():
            return "nothing", None
        text = row & ~self._bits(self._white)
        return ("text", _first(text)) if text.any() else ("white space", _first(row))

    def text(self, ids: Sequence[int]) -> str:
        """Raises `UnclearError` where the ids are no whole characters."""
        if self.vocabulary is None:
            raise UnclearError("no vocabulary")
        try:
            return b"".join(map(self.vocabulary.piece, ids)).decode()
        except UnicodeDecodeError:
            raise UnclearError("half a character") from None

    def end_ids(self, parameters: Any) -> tuple[int, ...]:
        """The ids that end a request and are no text."""
        special = self.vocabulary.special if self.vocabulary is not None else frozenset()
        stops = {number for number in parameters.all_stop_token_ids if number in special}
        return tuple(sorted({parameters.eos_token_id, *stops}))


def _first(row: Any) -> int:
    """The number of a bit that is set."""
    word = int(row.argmax())
    bits = int(row[word])
    return word * 32 + (bits & -bits).bit_length() - 1


def _machine(kind: str, source: str) -> Machine | None:
    try:
        return Machine(_WRITTEN[kind](source))
    except (UnclearError, RecursionError):
        return None


class _Value:
    """The structured value of one request while it is generated."""

    __slots__ = (
        "_backend",
        "_ends",
        "_from",
        "_is_clear",
        "_onward",
        "_readings",
        "_seen",
        "accepted",
        "is_ending",
        "watched",
    )

    def __init__(self, ends: Ends, manager: Any, request: Any) -> None:
        self._ends = ends
        self._backend = manager
        gated = (
            manager.reasoner_cls is not None
            and not manager.enable_in_reasoning
            and request.structured_output_request.reasoning_ended is not True
        )
        # The first token of the value: known from the start only where no reasoning comes before it.
        self._from: range | None = None if gated else range(1)
        self._readings: dict[int, Reading] | None = None
        self._seen = 0
        self._is_clear = True
        self._onward: int | None = None
        """A token that showed, when it was allowed last, that the value was not over."""
        self.accepted: bool | None = None
        self.is_ending = False
        wanted = (request.sampling_params.extra_args or {}).get(REQUEST_SETTING, 1)
        self.watched = (
            bool(wanted)
            and request.sampling_params.eos_token_id is not None  # with ignore_eos there is none
            and not getattr(request, "resumable", False)
        )

    def name_cause(self, request: Any) -> None:
        """Tells that the grammar ended the request; not where the request has a stop string of that name."""
        from vllm.v1.request import RequestStatus

        ended = request.status == RequestStatus.FINISHED_STOPPED and request.stop_reason is None
        if self.is_ending and ended and STOP_REASON not in (request.sampling_params.stop or ()):
            request.stop_reason = STOP_REASON

    def is_over(self, request: Any) -> bool:
        """After a token that the grammar took: whether the value is whole and only white space could follow it."""
        try:
            return self._has_begun(request) and self._is_over(request)
        except Exception:
            _log.exception("penstock: the grammar stop failed on request %s and lets it go on", request.request_id)
            self.watched = False
            return False

    def _has_begun(self, request: Any) -> bool:
        if self._from is None:
            if not request.structured_output_request.reasoning_ended:
                return False
            processed = getattr(request.structured_output_request.grammar, "num_processed_tokens", None)
            if processed is not None:
                start = request.num_output_tokens - processed
                self._from = range(start, start + 1)
            else:  # guidance does not count; the token that ended the reasoning may be the value's first, or not
                last = request.num_output_tokens - 1
                self._from = range(last, last + 2)
        return True

    def _is_over(self, request: Any) -> bool:
        parameters = request.sampling_params
        if not self.watched or self.is_ending:
            return False
        grammar, end = request.structured_output_request.grammar, parameters.eos_token_id
        if grammar.is_terminated():
            return False
        matcher = getattr(grammar, "ll_matcher", None)
        if matcher is not None and matcher.is_stopped():  # guidance's own word that nothing may follow
            return not matcher.is_error()
        if grammar.validate_tokens([end]) != [end]:
            return False
        # A number that may grow may mostly grow by the same digit again: asked that, no mask is needed.
        if self._onward is not None and grammar.validate_tokens([self._onward]):
            return False
        left, token = self._ends.left(self._backend.backend, grammar, self._ends.end_ids(parameters))
        if left == "nothing":  # even before min_tokens: there is no token left that the grammar would take
            return True
        over = left == "white space" and self._ends_in_white_space(request)
        if left == "text" or not self._is_clear:
            self._onward = token
        return over and request.num_output_tokens >= parameters.min_tokens

    def _ends_in_white_space(self, request: Any) -> bool:
        """Asks the grammar itself: to a mask, which shows the next token only, `a( b)?` looks like `a ?`."""
        if not self._is_clear:
            return False
        try:
            readings = self._read(request)
        except UnclearError:
            self._is_clear = False
            self._readings = None  # which are large where they came to a bound
            return False
        whole = [reading for reading in readings if reading.is_whole]
        return bool(whole) and all(reading.can_only_add_white_space for reading in whole)

    def _read(self, request: Any) -> list[Reading]:
        """None yet where the text is long: the rest is read at the next token that looks like the end."""
        ids = request.output_token_ids
        if self._readings is None:
            kind, source = request.structured_output_request.structured_output_key
            machine = self._ends.machine(kind.name, source) if kind.name in _WRITTEN else None
            if machine is None:
                raise UnclearError("a grammar that is not read here")
            starts = self._from or range(1)
            self._readings = {start: Reading(machine) for start in starts}
            self._seen = starts.stop - 1
            for start, reading in self._readings.items():
                reading.feed(self._ends.text(list(ids[start : self._seen])))
        new = self._ends.text(list(ids[self._seen :]))
        self._seen = len(ids)
        for reading in self._readings.values():
            reading.feed(new)
        read = [reading.catch_up() for reading in self._readings.values()]
        return list(self._readings.values()) if all(read) else []
