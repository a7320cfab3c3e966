"""One request, from its first signal to its single ending: what happened goes in, what shall be done comes out.

    engine bytes -> reader -> the journey -> numbered and spelled in the client's dialect -> client bytes

The shell tells it signals and carries out its commands, in their order. What becomes of the answer on its way is
`journey`'s to know, how it is put into bytes `transcript`'s; here it is decided when a stream begins, who speaks, what
time means for it, and how it ends.
"""

from collections.abc import Callable
from enum import Enum
from typing import Literal, assert_never, cast

from penstock.core.accounting import size_of
from penstock.core.commands import (
    AbortEngine,
    AskAgain,
    AskEngineHealth,
    AskModerator,
    Close,
    Command,
    CutClient,
    Ending,
    KeepAnswer,
    NoteIntervention,
    OpenClient,
    PauseEngine,
    RecordUsage,
    Respond,
    ResumeEngine,
    RunTools,
    SendToClient,
    TryAnotherEngine,
    WakeAt,
)
from penstock.core.dialects import Spelling
from penstock.core.engine_stream import ChatReader, refusal_message
from penstock.core.errors import EngineError, LimitReached, OurBug, Overloaded, Problem
from penstock.core.events import (
    Annotation,
    EngineDone,
    EngineOpened,
    Event,
    Failed,
    Finished,
    FinishReason,
    StreamEnded,
    StreamStarted,
    StreamStatus,
    Text,
    ToolEnded,
    ToolProgress,
    ToolResult,
    Usage,
    Warned,
    utf8_size,
)
from penstock.core.journey import Journey
from penstock.core.kept_answer import AnswerKeeper
from penstock.core.request import StreamRequest
from penstock.core.setting import Setting
from penstock.core.signals import (
    Annotated,
    AnswerTold,
    Broke,
    Cancelled,
    ClientBacklog,
    ClientLeft,
    ClockTicked,
    Draining,
    EngineAnswered,
    EngineChosen,
    EngineClosed,
    EngineRefused,
    EngineSpoke,
    EngineTagged,
    NoEngineLeft,
    ReadAgain,
    Signal,
    StoreLost,
    TakenOver,
    ToolReturned,
    ToolTried,
    Unread,
    VerdictReached,
)
from penstock.core.timeline import Timeline
from penstock.core.transcript import Transcript

# What is not heard any more of an engine that was given up.
_OF_AN_ENGINE = (EngineSpoke, EngineTagged, EngineAnswered, AnswerTold, EngineRefused, EngineClosed)


class _Phase(Enum):
    WAITING = 1  # no byte was sent: what fails now is an HTTP answer
    OPEN = 2  # the head was sent: what fails now is an event
    OVER = 3


class Exchange:
    """One conversation. `spell` makes the dialect, given a way to ask for the tokens of a choice so far.

    Call `start` once, then `receive` with every signal; after the commands end with `Close`, nothing follows.
    """

    def __init__(
        self,
        request: StreamRequest,
        setting: Setting,
        spell: Callable[[Callable[[int], tuple[int, int]]], Spelling],
    ) -> None:
        self._request = request
        self._setting = setting
        self._phase = _Phase.WAITING
        self._reader = ChatReader(setting.bounds.line_bytes, request.choices, request.engine_stops)
        self._tagged = setting.tagged
        self._upstream = setting.upstream
        self._gave_up: tuple[Ending, Problem] | None = None  # what made us look for another engine
        self._journey = Journey(request, setting, self._new_call_id)
        self._is_running_tools = False
        self._is_policed = setting.policy is not None or setting.watching is not None
        self._awaits_verdicts = False  # the engine has said all, and a finish waits for its verdicts
        self._asks_at: float | None = None
        self._timeline = Timeline() if request.audit_timeline else None
        self._keeper = AnswerKeeper(setting.keep_bytes) if setting.keep_bytes else None
        self._dialect = spell(self._journey.accounting.tokens_of)
        self._begun: StreamStarted | None = None
        self._told = Transcript(self._dialect, self._start, started=setting.started, epoch_ms=setting.epoch_ms)
        self._unsaid: list[Event] = []  # waits for the first event, since an answer may still be refused
        self._sent = 0
        self._wanted_tokens: int | None = None  # generated when the last reader left
        self._last_write = setting.started
        self._last_heard = setting.started  # or asked about: the engine's health is asked once a silence

    @property
    def content_type(self) -> str:
        return self._dialect.content_type

    @property
    def is_over(self) -> bool:
        return self._phase is _Phase.OVER

    @property
    def client_lags(self) -> bool:
        """Whether the shell is to tell `ClientBacklog` when the client has room again."""
        return self._journey.pacing.lags and self._phase is not _Phase.OVER

    @property
    def held_bytes(self) -> int:
        """What waits in here for a client that lags."""
        return self._journey.pacing.held_bytes

    def start(self) -> list[Command]:
        return [self._next_wake(self._setting.started)]

    def receive(self, signal: Signal) -> list[Command]:
        """What to do about a signal, in order. Never raises on anything that came from outside."""
        # To an engine that was done with.
        is_deaf = self._gave_up is not None or self._is_running_tools or self._awaits_verdicts
        if self._phase is _Phase.OVER or (is_deaf and isinstance(signal, _OF_AN_ENGINE)):
            return []
        match signal:
            case EngineSpoke():
                self._tagged = None  # asked for tagged tokens, it may still have answered in chunks of its own
                return self._hear(self._reader.feed(signal.data), signal.now)
            case EngineTagged():
                return self._hear(self._tagged.read(signal.records) if self._tagged else [], signal.now)
            case EngineChosen():
                return self._change_engine(signal)
            case NoEngineLeft():
                return self._without_engine(signal)
            case EngineAnswered() | AnswerTold():
                read = self._reader.read_whole
                return self._hear(signal.events if isinstance(signal, AnswerTold) else read(signal.body), signal.now)
            case EngineRefused():
                return self._refused(signal)
            case EngineClosed():
                return self._engine_closed(signal)
            case ClockTicked():
                return self._tick(signal.now)
            case ClientLeft():
                return self._leave(signal.now)
            case ClientBacklog():
                return self._client_backlog(signal)
            case Unread() | ReadAgain():
                is_read = isinstance(signal, ReadAgain)
                self._wanted_tokens = None if is_read else self._journey.accounting.generated_tokens
                return []
            case Annotated() | ToolTried() | ToolReturned():
                return self._annotate(signal) if isinstance(signal, Annotated) else self._run_on(signal)
            case Cancelled():
                return self._end(Ending.CANCELLED, None, signal.now)
            case VerdictReached():
                return self._judge(signal)
            case Draining():
                draining = Overloaded("draining", "this replica is shutting down; send the request again")
                return self._fail(Ending.DRAINING, draining, signal.now)
            case StoreLost():
                return self._lose_store(signal)
            case TakenOver():
                return self._drop(Ending.TAKEN_OVER, signal.now)
            case Broke():
                problem = OurBug("internal_error", "Penstock failed on this stream; its log has the stream id")
                return self._fail(Ending.OUR_BUG, problem, signal.now)
            case _:
                assert_never(signal)

    # -- the journey -------------------------------------------------------------------------------

    def _hear(self, heard: list[Event], now: float) -> list[Command]:
        """One read of the engine, taken all the way."""
        self._last_heard = now
        if self._keeper is not None:
            self._keeper.note(heard)
        items, done, failure = self._sort(heard)
        if self._timeline is not None:
            self._timeline.note(items, now - self._setting.started)
        items = self._journey.travel(items, now)
        if self._unsaid and items:
            items, self._unsaid = [*self._unsaid, *items], []
        commands = self._send(items, now)
        if self._is_policed:
            commands = self._interventions() + commands + self._ask(now)
            if (halt := self._journey.halted) is not None:
                return commands + self._end(Ending.HALTED, _told(halt), now)
        if failure is not None and self._is_untouched() and failure.status >= 500:
            return commands + self._try_another(Ending.ENGINE_ERROR, _problem_of(failure))
        if failure is not None:
            return commands + self._end(Ending.ENGINE_ERROR, failure, now)
        if done or (self._request.stop and self._journey.has_stopped):
            if self._journey.verdicts.is_waiting:
                self._awaits_verdicts = True
                return commands if done else [*commands, AbortEngine()]
            return commands + self._engine_has_said_all(now, is_done=done)
        if max(self._sent, self._journey.accounting.generated_bytes) >= self._setting.bounds.stream_bytes:
            return commands + self._fail(Ending.CAP_REACHED, self._byte_cap(), now)
        if self._journey.longest_call > self._setting.bounds.tool_call_bytes:
            return commands + self._fail(Ending.CAP_REACHED, self._call_cap(), now)
        return commands + self._pace(now) if self._journey.pacing.lags else commands

    def _interventions(self) -> list[Command]:
        return [NoteIntervention(one) for one in self._journey.take_interventions()]

    def _ask(self, now: float) -> list[Command]:
        """The windows that are full, and a clock for those that are not."""
        self._journey.verdicts.due(now)
        asked = self._journey.verdicts.take_questions()
        commands: list[Command] = [AskModerator(one.number, one.text, one.watches) for one in asked]
        deadline = self._journey.verdicts.deadline
        if deadline != self._asks_at:
            self._asks_at = deadline
            commands.append(self._next_wake(now))
        return commands

    def _judge(self, verdict: VerdictReached) -> list[Command]:
        """What a verdict lets go on its way, or the halt; and the end, if that was all that it waited for."""
        now = verdict.now
        items = self._journey.judge(verdict)
        commands = self._interventions() + self._send(items, now)
        if (halt := self._journey.halted) is not None:
            return commands + self._end(Ending.HALTED, _told(halt), now)
        if self._awaits_verdicts and not self._journey.verdicts.is_waiting:
            self._awaits_verdicts = False
            return commands + self._engine_has_said_all(now, is_done=True)
        return commands

    def _engine_has_said_all(self, now: float, *, is_done: bool) -> list[Command]:
        return self._run_tools() if self._journey.loop.is_due else self._conclude(now, engine_is_done=is_done)

    def _let_go(self) -> list[Event]:
        """What the reader and the steps still hold, when no more will come."""
        items, _, _ = self._sort((self._tagged or self._reader).close())
        return self._journey.let_go(items, self._last_heard)

    def _sort(self, heard: list[Event]) -> tuple[list[Event], bool, Failed | None]:
        """Takes out of what was heard what concerns the whole exchange and no step."""
        if len(heard) == 1 and isinstance(heard[0], Text):  # nearly all that is ever heard
            return heard, False, None
        items: list[Event] = []
        done, failure = False, None
        for event in heard:
            if isinstance(event, EngineOpened):
                self._begin(event)
            elif isinstance(event, EngineDone):
                done = True
            elif isinstance(event, Failed):
                failure = self._journey.fit_to_tell(event)
            else:
                items.append(event)
        return items, done, failure

    def _begin(self, opened: EngineOpened) -> None:
        self._begun = StreamStarted(
            model=opened.model or self._request.model,
            choices=self._request.choices,
            upstream=self._upstream,
            trace_id=self._setting.trace_id,
            engine_id=opened.engine_id or f"chatcmpl-{self._setting.stream_id}",
            created=opened.created,
            whole=self._journey.moderation.without_unseen_text(opened.whole) if opened.whole else None,
            resumable_until=self._setting.resumable_until,
            continues=self._request.continues,
        )
        if opened.state is not None:
            self._journey.begin_in(opened.state)

    # -- to the client -----------------------------------------------------------------------------

    def _send(self, items: list[Event], now: float) -> list[Command]:
        data = self._told.spell(items, now)
        if not self._dialect.streams or not data:
            return []
        self._sent += len(data)
        self._last_write = now
        if self._phase is _Phase.WAITING:
            self._phase = _Phase.OPEN
            return [OpenClient(self._dialect.preamble), SendToClient(data, self._told.seq)]
        return [SendToClient(data, self._told.seq)]

    def _start(self) -> StreamStarted:
        if self._begun is None:
            self._begin(EngineOpened(None, None, None))
        return cast(StreamStarted, self._begun)

    def _client_backlog(self, signal: ClientBacklog) -> list[Command]:
        if self._phase is not _Phase.OPEN:
            return []  # nothing was sent, so nothing can wait
        commands = self._send(self._journey.pacing.told(signal.unsent, signal.now), signal.now)
        return [*commands, *self._pace(signal.now), *self._wake_again(signal.now)]

    def _pace(self, now: float) -> list[Command]:
        """What a client that lags, or lags no more, means for the engine and for itself."""
        if self._journey.pacing.must_pause(shared=self._tagged is not None):
            return [PauseEngine()]
        if self._journey.pacing.may_resume():
            self._last_heard = now
            return [ResumeEngine()]
        problem = self._journey.pacing.verdict(now)
        if problem is None:
            return []
        if self._setting.outlives_client:
            return self._cut_off(problem, now)
        return self._fail(Ending.CLIENT_TOO_SLOW, problem, now)

    def _cut_off(self, problem: Problem, now: float) -> list[Command]:
        """The connection ends, the stream does not: from here on it goes into the log, and nobody lags."""
        commands: list[Command] = [CutClient(self._dialect.cut_off(problem))]
        waiting = self._journey.pacing.told(0, now) + self._journey.pacing.let_go()
        return [*commands, *self._send(waiting, now), *self._pace(now)]

    def _annotate(self, noted: Annotated) -> list[Command]:
        """What a backend adds goes out behind what was sent so far, but never before the stream has begun."""
        note = Annotation(noted.kind, noted.data, None, noted.anchor)
        if self._told.seq == 0:
            self._unsaid.append(note)
            return []
        return self._send(self._journey.pacing.feed([note]), noted.now)

    # -- time --------------------------------------------------------------------------------------

    def _tick(self, now: float) -> list[Command]:
        bounds = self._setting.bounds
        if now >= self._setting.started + bounds.stream_seconds:
            message = (
                f"the stream lasted {bounds.stream_seconds:g} s, the limit of this deployment "
                "(limits.stream_seconds); ask for fewer tokens or continue in a new request"
            )
            return self._fail(Ending.TIME_LIMIT, LimitReached("stream_time_limit", message, status=504), now)
        commands: list[Command] = []
        if self._dialect.streams and self._phase is _Phase.WAITING:
            if now >= self._setting.started + bounds.first_byte_seconds:
                self._phase, self._last_write = _Phase.OPEN, now
                commands.append(OpenClient(self._dialect.preamble))
        elif self._dialect.streams and now >= self._last_write + bounds.heartbeat_seconds:
            self._last_write = now
            if not self._journey.pacing.lags:  # whoever lags has enough to read
                commands.append(SendToClient(self._dialect.heartbeat))
        if now >= self._last_heard + bounds.engine_silence_seconds:
            self._last_heard = now
            if not self._journey.pacing.is_paused:  # its silence is our doing
                commands.append(AskEngineHealth())
        asks = self._ask(now) if self._is_policed else []
        return [*commands, *asks, *self._pace(now), *self._wake_again(now)]

    def _wake_again(self, now: float) -> list[Command]:
        return [] if self._phase is _Phase.OVER else [self._next_wake(now)]

    def _next_wake(self, now: float) -> WakeAt:
        bounds, started = self._setting.bounds, self._setting.started
        when = min(started + bounds.stream_seconds, self._last_heard + bounds.engine_silence_seconds)
        if self._dialect.streams:
            waiting = self._phase is _Phase.WAITING
            idle = started + bounds.first_byte_seconds if waiting else self._last_write + bounds.heartbeat_seconds
            when = min(when, idle)
        looks = (self._journey.pacing.next_look(now), self._journey.verdicts.deadline)
        return WakeAt(min(when, *(look for look in looks if look is not None)) if any(looks) else when)

    # -- endings -----------------------------------------------------------------------------------

    def _engine_closed(self, signal: EngineClosed) -> list[Command]:
        items, _, _ = self._sort((self._tagged or self._reader).close())
        commands = self._send(self._journey.travel(items, signal.now), signal.now)
        if self._is_policed:
            commands = self._interventions() + commands + self._ask(signal.now)
            if (halt := self._journey.halted) is not None:
                return commands + self._end(Ending.HALTED, _told(halt), signal.now)
        problem = signal.problem
        if problem is None and self._journey.verdicts.is_waiting:
            self._awaits_verdicts = True
            return commands
        if problem is None and self._journey.loop.is_due:
            return commands + self._run_tools()
        if problem is None and self._journey.has_finished:
            warned = Warned("missing_done", "the engine closed without its end mark")
            commands += self._send(self._journey.pacing.feed([warned]), signal.now)
            return commands + self._conclude(signal.now, engine_is_done=True)
        if problem is None:
            problem = EngineError("engine_incomplete", "the engine's answer ended without saying how it finished")
        ending = Ending.CAP_REACHED if isinstance(problem, LimitReached) else Ending.ENGINE_GONE
        if ending is Ending.ENGINE_GONE and problem.retryable and self._is_untouched():
            return commands + self._try_another(ending, problem)
        return commands + self._fail(ending, problem, signal.now)

    def _refused(self, signal: EngineRefused) -> list[Command]:
        message, body = refusal_message(signal.status, signal.body)
        status = signal.status if 400 <= signal.status < 600 else 502
        retryable = status in (408, 429) or status >= 500
        problem = EngineError("engine_refused", message, status=status, retryable=retryable, engine_body=body)
        if retryable and self._is_untouched():
            return self._try_another(Ending.REFUSED, problem)
        return self._fail(Ending.REFUSED, problem, signal.now)

    # -- tools that are run here --------------------------------------------------------------------

    def _run_tools(self) -> list[Command]:
        self._is_running_tools = True
        return [RunTools(self._journey.loop.runs())]

    def _run_on(self, signal: ToolTried | ToolReturned) -> list[Command]:
        """A call is tried, or has come back; when all have, the model is asked again."""
        self._last_heard = signal.now
        call_id, name = signal.call_id, signal.name
        if isinstance(signal, ToolTried):
            status: Literal["running", "retrying"] = "running" if signal.attempt == 1 else "retrying"
            return self._tell_of_tools([ToolProgress(0, call_id, name, status, signal.attempt)], signal.now)
        size, duration = utf8_size(signal.answer), int(signal.seconds * 1000)
        result = ToolResult(0, call_id, name, signal.problem is None, size, duration, signal.problem)
        commands = self._tell_of_tools([self._journey.loop.take(call_id, signal.answer, result)], signal.now)
        if (halt := self._journey.halted) is not None:
            return commands + self._end(Ending.HALTED, _told(halt), signal.now)
        if not self._journey.loop.is_answered:
            return commands
        request, told = self._journey.loop.ask_again()
        self._begin_round(request)
        return [*commands, *self._tell_of_tools(told, signal.now), AskAgain(request, self._journey.loop.round)]

    def _tell_of_tools(self, items: list[Event], now: float) -> list[Command]:
        sent = self._send(self._journey.tell(items), now)
        return self._interventions() + sent

    def _begin_round(self, request: StreamRequest) -> None:
        """The engine speaks anew; what the client has seen goes on."""
        self._is_running_tools = False
        self._request = request
        self._journey.begin_round(request)

    # -- another engine ----------------------------------------------------------------------------

    def _is_untouched(self) -> bool:
        """No event was told and no token heard, so another engine may answer and nobody can tell the difference."""
        return self._told.seq == 0 and self._journey.has_heard_nothing

    def _try_another(self, ending: Ending, problem: Problem) -> list[Command]:
        self._gave_up = (ending, problem)
        return [TryAnotherEngine(problem)]

    def _change_engine(self, chosen: EngineChosen) -> list[Command]:
        self._upstream, self._tagged = chosen.upstream, chosen.tagged
        self._reader = ChatReader(self._setting.bounds.line_bytes, self._request.choices, self._request.engine_stops)
        self._begun, self._gave_up, self._last_heard = None, None, chosen.now
        self._journey.pacing.is_paused = False  # it was another engine that waits
        self._told.forget_ext()
        if self._keeper is not None:
            self._keeper.begin_anew()
        return []

    def _without_engine(self, signal: NoEngineLeft) -> list[Command]:
        ending, problem = self._gave_up or (Ending.ENGINE_GONE, signal.problem)
        return self._fail(ending, problem, signal.now)

    def _lose_store(self, signal: StoreLost) -> list[Command]:
        if signal.fatal:
            message = "the store that logs the streams is gone, and nothing is sent here that is not logged; try again"
            return self._fail(Ending.STORE_LOST, Overloaded("store_lost", message), signal.now)
        warning = Warned("resume_lost", "from here on the stream can be resumed at this replica only")
        if self._told.seq == 0:
            self._unsaid.append(warning)
            return []
        return self._send([warning], signal.now)

    def _leave(self, now: float) -> list[Command]:
        """Nobody reads any more. What is said to nobody goes into the log, so that whoever comes back learns of it."""
        if self._phase is _Phase.OPEN and self._setting.is_logged:
            return self._end(Ending.CLIENT_GONE, None, now)
        return self._drop(Ending.CLIENT_GONE, now)

    def _drop(self, ending: Ending, now: float) -> list[Command]:
        """The end of a stream to which nothing can be said any more."""
        self._phase = _Phase.OVER
        held = self._journey.pacing.let_go()
        self._journey.accounting.take_back(held)
        unsent = size_of(held) + size_of(self._let_go())
        usage = self._journey.accounting.usage(final=True, wanted_tokens=self._wanted())
        record = self._record(ending, usage, None, now, unsent)
        return [AbortEngine(), *self._interventions(), record, Close()]

    def _wanted(self) -> int:
        return self._journey.accounting.generated_tokens if self._wanted_tokens is None else self._wanted_tokens

    def _conclude(self, now: float, *, engine_is_done: bool) -> list[Command]:
        """The engine has said all; it counts as success only if it told of every choice how it finished."""
        if not self._journey.has_finished:
            problem = EngineError("engine_incomplete", "the engine ended its stream without finishing each choice")
            return self._fail(Ending.ENGINE_ERROR, problem, now)
        reasons = self._journey.blocks.finish_reasons
        status: StreamStatus = "incomplete" if "length" in reasons else "completed"
        held = self._journey.count(self._let_go())
        if (halt := self._journey.halted) is not None:
            return self._send(held, now) + self._end(Ending.HALTED, _told(halt), now)
        abort: list[Command] = [] if engine_is_done else [AbortEngine()]
        return abort + self._finish(held, Ending.COMPLETED, status, None, now)

    def _fail(self, ending: Ending, problem: Problem, now: float) -> list[Command]:
        if self._phase is _Phase.WAITING and self._told.seq == 0:
            return self._respond_problem(ending, problem, now)
        return self._end(ending, _told(problem), now)

    def _end(self, ending: Ending, failure: Failed | None, now: float) -> list[Command]:
        """Any ending but success: what was held, the error, then every open thing is closed as incomplete."""
        if failure is not None and self._phase is _Phase.WAITING and self._told.seq == 0:
            refused = failure.status < 500 and ending is Ending.ENGINE_ERROR
            return self._respond_problem(Ending.REFUSED if refused else ending, _problem_of(failure), now)
        held = self._journey.count(self._let_go())
        ends = [event for event in held if isinstance(event, ToolEnded) and event.status == "incomplete"]
        is_halt = ending is Ending.HALTED
        reason: FinishReason = "content_filter" if is_halt else "cancelled" if failure is None else "error"
        cause = None if is_halt else "abort" if failure is None else "error"
        unfinished = [n for n in range(self._request.choices) if not self._journey.blocks.is_finished(n)]
        error: list[Event] = [failure] if failure else []
        finishes: list[Event] = [Finished(n, None, reason=reason, cause=cause) for n in unfinished]
        told = [event for event in held if not (isinstance(event, ToolEnded) and event.status == "incomplete")]
        events = told + error + ends + self._journey.blocks.break_off() + self._journey.blocks.feed(finishes)
        status: StreamStatus = "cancelled" if failure is None else "failed"
        return [AbortEngine(), *self._finish(events, ending, status, failure, now)]

    def _finish(
        self, events: list[Event], ending: Ending, status: StreamStatus, failure: Failed | None, now: float
    ) -> list[Command]:
        """The last words of every stream: what still waits for its client, its final usage and its end."""
        events, self._unsaid = [*self._unsaid, *self._journey.pacing.let_go(), *events], []
        is_cancelled = failure is None and status == "cancelled"
        usage = self._journey.accounting.usage(final=True, wanted_tokens=self._wanted() if is_cancelled else None)
        started = self._setting.started
        ttft = self._told.ttft_seconds
        # Counted before it is spelled: `usage` and `stream.end` are the last two.
        count = self._told.number_after(events) + 2
        ttft_ms = None if ttft is None else int(ttft * 1000)
        end = StreamEnded(status, self._journey.blocks.finish_reasons, count, int((now - started) * 1000), ttft_ms)
        commands = self._send([*events, usage, end], now)
        if not self._dialect.streams:
            code, body = self._dialect.whole()
            commands = [Respond(code, body, {})]
        self._phase = _Phase.OVER
        record = self._record(ending, usage, failure.code if failure else None, now)
        kept = self._kept() if status == "completed" else []
        return [*commands, *self._interventions(), *kept, record, Close(patient=ending is Ending.COMPLETED)]

    def _kept(self) -> list[Command]:
        answer = self._keeper.answer() if self._keeper is not None else None
        return [] if answer is None else [KeepAnswer(answer)]

    def _respond_problem(self, ending: Ending, problem: Problem, now: float) -> list[Command]:
        """Nothing was sent yet, so the failure is a real HTTP status."""
        self._phase = _Phase.OVER
        unsent = size_of(self._let_go())
        usage = self._journey.accounting.usage(final=True)
        body = self._dialect.refusal(problem)
        return [
            AbortEngine(),
            Respond(problem.status, body, problem.headers),
            *self._interventions(),
            self._record(ending, usage, problem.code, now, unsent),
            Close(),
        ]

    def _record(self, ending: Ending, usage: Usage, code: str | None, now: float, unsent: int = 0) -> RecordUsage:
        started = self._setting.started
        return RecordUsage(
            ending=ending,
            usage=usage,
            finish_reasons=self._journey.blocks.finish_reasons,
            error_code=code,
            model=self._begun.model if self._begun else None,
            engine_id=self._begun.engine_id if self._begun else None,
            ttft_seconds=self._told.ttft_seconds,
            duration_seconds=now - started,
            unsent_bytes=unsent,
            timeline=None if self._timeline is None else self._timeline.entries,
            upstream=self._upstream,
        )

    def _byte_cap(self) -> LimitReached:
        cap = self._setting.bounds.stream_bytes
        message = f"the answer reached {cap} bytes, the limit of this deployment (limits.stream_bytes)"
        return LimitReached("stream_bytes_limit", message)

    def _call_cap(self) -> LimitReached:
        cap = self._setting.bounds.tool_call_bytes
        message = f"a tool call reached {cap} bytes, the limit of this deployment (limits.tool_call_bytes)"
        return LimitReached("tool_call_bytes_limit", message)

    def _new_call_id(self, choice: int, index: int) -> str:
        return f"call_{self._setting.stream_id[-24:]}_{choice}_{index}"


def _told(problem: Problem) -> Failed:
    body = dict(problem.engine_body) if problem.engine_body is not None else None
    return Failed(problem.code, problem.message, problem.retryable, problem.origin, body, problem.status)


def _problem_of(failure: Failed) -> Problem:
    """An error that came in band before anything was sent becomes a real HTTP answer, as if it had come as one."""
    return EngineError(
        "engine_refused" if failure.status < 500 else failure.code,
        failure.message,
        status=failure.status,
        retryable=failure.retryable,
        engine_body=failure.engine_body,
    )
