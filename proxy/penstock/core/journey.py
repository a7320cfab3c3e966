"""THE JOURNEY: the steps that an answer takes, in the one order there is.

    what the reader heard -> channels -> stop strings -> tools -> policy -> citations -> moderation -> verdicts
                          -> final values -> tool loop -> accounting -> blocks -> pacing -> numbered and spelled

Nothing else knows the order of the steps, and no two steps know each other. Late answers join it at the step that they
concern: a verdict behind the verdicts, what a tool did before the blocks, a note at the pacing.
"""

from collections.abc import Callable

from penstock.core.accounting import Accounting
from penstock.core.blocks import Blocks
from penstock.core.channels import Channels
from penstock.core.citations import Citations
from penstock.core.errors import PolicyError
from penstock.core.events import Event, Failed, Intervention
from penstock.core.moderation import Moderation
from penstock.core.pacing import Pacing
from penstock.core.request import StreamRequest
from penstock.core.setting import Setting
from penstock.core.signals import VerdictReached
from penstock.core.stop_strings import StopStrings
from penstock.core.structured import StructuredAnswers
from penstock.core.tool_calls import ToolCalls
from penstock.core.tool_loop import ToolLoop
from penstock.core.tool_policy import ToolPolicy
from penstock.core.verdicts import Verdicts

_USAGE_TICK_SECONDS = 1.0


class Journey:
    """The steps of one stream. Those that the exchange has to ask, or whose words it needs at the end, are public.

    `new_call_id(choice, index)` names a call to which the engine gave no id.
    """

    def __init__(self, request: StreamRequest, setting: Setting, new_call_id: Callable[[int, int], str]) -> None:
        self._setting = setting
        self._choices = range(request.choices)
        self._channels = self._channels_for(request)
        self._stop_strings = StopStrings(request.stop, include=request.include_stop)
        self._tools = ToolCalls(request.tools, new_call_id)
        self._policy = ToolPolicy(setting.tool_rules)
        self._citations = Citations(setting.citations if request.citations else ())
        self.moderation = Moderation(
            setting.policy,
            most_held=setting.bounds.hold_chars,
            fits=self._problem_of_call,
            json_in_answer=request.json_in_answer,
            begun=request.begun_text,
        )
        self.verdicts = Verdicts(setting.watching)
        self._structured = StructuredAnswers(request.structured)
        self.loop = ToolLoop(setting.loop, request)
        self.accounting = Accounting()
        self.blocks = Blocks()
        self.pacing = Pacing(setting.bounds.slow_client)
        self._last_tick = setting.started
        self._ticked_tokens = 0

    def travel(self, items: list[Event], now: float) -> list[Event]:
        """From what one read of the engine brought to what goes to the client."""
        self.accounting.generated(items)
        items = self._channels.feed(items)
        items = self._stop_strings.feed(items)
        items = self._tools.feed(items)
        items = self._policy.feed(items)
        items = self._citations.feed(items)
        items = self.moderation.feed(items)
        items = self.verdicts.feed(items, now)
        items = self._structured.feed(items)
        items = self.loop.feed(items)
        items = self.accounting.feed(items)
        items = self.blocks.feed(items)
        self._tick_usage(items, now)
        return self.pacing.feed(items)

    def let_go(self, items: list[Event], now: float) -> list[Event]:
        """What the steps still hold, when no more will come: text, and calls that stay unfinished. Not counted yet."""
        self.accounting.generated(items)
        items = self._channels.feed(items) + self._channels.flush()
        items = self._stop_strings.feed(items) + self._stop_strings.flush()
        items = self._policy.feed(self._tools.feed(items) + self._tools.flush())
        items = self._citations.feed(items) + self._citations.flush()
        items = self.moderation.feed(items) + self.moderation.flush()
        items = self.verdicts.feed(items, now) + self.verdicts.flush()
        return self._structured.feed(items) + self._structured.flush()

    def judge(self, verdict: VerdictReached) -> list[Event]:
        """What a verdict lets go on its way."""
        items = self.verdicts.hear(verdict.number, verdict.watch, verdict.opinion, verdict.category)
        items = self.loop.feed(self._structured.feed(items))
        return self.pacing.feed(self.count(items))

    def count(self, items: list[Event]) -> list[Event]:
        """The last steps of what `let_go` gave."""
        return self.blocks.feed(self.accounting.feed(items))

    def tell(self, items: list[Event]) -> list[Event]:
        """What no engine said: how the tools fare that are run here. What is shown of their answers is moderated."""
        return self.pacing.feed(self.blocks.feed(self.moderation.feed(items)))

    def fit_to_tell(self, failed: Failed) -> Failed:
        """The engine's error, without what may be words of the answer where those are judged."""
        is_judged = self._setting.policy is not None or self._setting.watching is not None
        if failed.quote and not is_judged:
            failed.message += f": {failed.quote}"
        return self.moderation.fit_to_tell(failed)

    def begin_in(self, state: str) -> None:
        """The engine said in which state of the family its answer begins."""
        self._channels.begin_in(state)

    def begin_round(self, request: StreamRequest) -> None:
        """The engine speaks anew; what the client has seen goes on."""
        self._channels = self._channels_for(request)
        self._stop_strings = StopStrings(request.stop, include=request.include_stop)
        self._tools.next_round()
        self._policy.next_round()
        self.accounting.next_round()

    # -- what the steps know together --------------------------------------------------------------

    @property
    def halted(self) -> PolicyError | None:
        return self.moderation.halted or self.verdicts.halted

    def take_interventions(self) -> list[Intervention]:
        """What was done to the text since it was asked last."""
        return self.moderation.take_notes() + self.verdicts.take_notes()

    @property
    def longest_call(self) -> int:
        """UTF-8 bytes of the longest call that is still open."""
        return self._tools.longest_call

    @property
    def has_finished(self) -> bool:
        """Of every choice it was told how it finished."""
        return all(map(self.blocks.is_finished, self._choices))

    @property
    def has_stopped(self) -> bool:
        """Our own stop strings cut every choice, though the engine goes on."""
        return all(map(self._stop_strings.has_stopped, self._choices))

    @property
    def has_heard_nothing(self) -> bool:
        return self.accounting.generated_tokens == 0 and self.accounting.generated_bytes == 0

    def _channels_for(self, request: StreamRequest) -> Channels:
        setting, tools = self._setting, bool(request.tools)
        return Channels(setting.family, policy=setting.reasoning, tools=tools, thinking=request.thinking)

    def _problem_of_call(self, name: str, arguments: str) -> str | None:
        """Why a call may not be executed with arguments that are not the model's own any more, or None."""
        return self._tools.problem_of(name, arguments) or self._policy.problem_of(name, arguments)

    def _tick_usage(self, items: list[Event], now: float) -> None:
        if now - self._last_tick < _USAGE_TICK_SECONDS:
            return
        tokens = self.accounting.generated_tokens
        if tokens != self._ticked_tokens:
            self._last_tick, self._ticked_tokens = now, tokens
            items.append(self.accounting.usage(final=False))
