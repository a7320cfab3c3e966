"""What a client that lags has no room for: merged, shed, paused for, let go in order, cut off."""

import json
from dataclasses import replace
from itertools import repeat
from typing import Any

import pytest

from penstock.core.commands import (
    AbortEngine,
    AskEngineHealth,
    CutClient,
    Ending,
    PauseEngine,
    ResumeEngine,
    SendToClient,
    WakeAt,
)
from penstock.core.pacing import Measure, SlowClient
from penstock.core.signals import ClientBacklog, ClientLeft, ClockTicked, EngineChosen, EngineClosed, EngineSpoke
from support.chunks import DONE, content, final_usage, finish, frame, reasoning, role, spoken, tool
from support.playbook import STARTED, Json, Outcome, ask, open_exchange, play

BUFFER = 2**16
POLICY = SlowClient(frozenset({"merge", "shed", "pause", "cut"}), BUFFER, stall_seconds=30.0)
NOW = STARTED + 1.0
STALLED = ClientBacklog(BUFFER // 4 + 1, NOW)
ROOM = ClientBacklog(0, NOW + 1.0)
END = [finish(), final_usage(7), DONE]


def without(*measures: Measure) -> SlowClient:
    return replace(POLICY, measures=POLICY.measures - set(measures))


def lagging(*steps: Any, body: Json | None = None, policy: SlowClient = POLICY, **setting: Any) -> Outcome:
    """A client that lags after the first word, while `steps` happen."""
    return play(body, [role(), content("="), STALLED, *steps], slow_client=policy, **setting)


def deltas(outcome: Outcome) -> list[str]:
    return [event["text"] for event in outcome.events if event["type"].startswith("delta.") and "text" in event]


def test_nothing_goes_to_a_client_that_lags() -> None:
    outcome = lagging(content("a"), content("b"))
    assert deltas(outcome) == ["="]
    assert outcome.exchange.client_lags


def test_what_waited_is_one_delta_when_there_is_room() -> None:
    outcome = lagging(*map(content, "abc"), ROOM, content("d"), *END)
    assert deltas(outcome) == ["=", "abc", "d"]
    assert outcome.blocks() == ["text: =abcd"]
    assert not outcome.exchange.client_lags


def test_without_merging_every_delta_is_its_own() -> None:
    assert deltas(lagging(*map(content, "abc"), ROOM, policy=without("merge"))) == ["=", "a", "b", "c"]


def test_deltas_of_other_blocks_and_choices_are_not_mixed() -> None:
    said = [content("a"), content("A", 1), reasoning("r"), content("B", 1), reasoning("s"), content("b"), ROOM]
    outcome = lagging(*said, body=ask(n=2))
    assert deltas(outcome) == ["=", "a", "AB", "rs", "b"]
    assert outcome.blocks(0) == ["text: =a", "reasoning: rs", "text: b"]
    assert outcome.blocks(1) == ["text: AB"]


def test_the_pieces_of_a_call_are_merged_until_it_ends() -> None:
    pieces = ['{"a"', ":", "1}"]
    call = [tool(call_id="c", name="f"), *(tool(arguments=piece) for piece in pieces)]
    outcome = lagging(*call, content("x"), ROOM, body=ask(tools=["f"]))
    assert [event["text"] for event in outcome.all_of("tool_call.arguments_chunk")] == ["".join(pieces)]
    assert outcome.one("tool_call.ready")["arguments"] == {"a": 1}


def test_logprobs_and_token_ids_of_merged_deltas_are_all_there() -> None:
    said = [
        spoken({"content": text}, logprobs={"content": [{"token": text}]}, token_ids=[number])
        for number, text in enumerate("ab")
    ]
    event = lagging(*said, content("c"), ROOM).events[-2]
    assert (event["text"], event["logprobs"], event["token_ids"]) == ("ab", [{"token": "a"}, {"token": "b"}], [0, 1])


def test_a_merged_delta_does_not_become_a_book() -> None:
    outcome = lagging(*repeat(content("x" * 1000), 30), ROOM, ROOM)
    longest = max(map(len, deltas(outcome)))
    assert 10_000 < longest <= 16_384
    assert sum(map(len, deltas(outcome))) == 30_001


def test_fields_of_the_engine_go_with_what_is_sent() -> None:
    outcome = lagging(frame({"choices": [{"index": 0, "delta": {"content": "a"}, "mood": "calm"}]}), ROOM)
    assert [event["ext"] for event in outcome.events if "ext" in event] == [{"mood": "calm"}]


@pytest.mark.parametrize(("policy", "told"), [(POLICY, 0), (without("shed"), 1)])
def test_running_usage_is_not_for_a_client_that_lags(policy: SlowClient, told: int) -> None:
    later = EngineSpoke(content("a", tokens=5), STARTED + 3.0)
    outcome = lagging(content("x"), later, ClientBacklog(0, STARTED + 4.0), policy=policy)
    assert len(outcome.all_of("usage")) == told


def test_the_final_usage_is_never_shed() -> None:
    outcome = lagging(content("a"), *END)
    assert outcome.usage()["final"]
    assert outcome.blocks() == ["text: =a"]
    assert outcome.record.ending is Ending.COMPLETED


def test_a_warning_keeps_its_place() -> None:
    outcome = lagging(content("a"), finish(), content("late"), EngineClosed(None, NOW), policy=without("pause"))
    types = outcome.types()
    assert types.index("delta.text") < types.index("finish") < types.index("warning")


def test_whoever_lags_gets_no_heartbeat() -> None:
    outcome = lagging(ClockTicked(STARTED + 16.0), ClientBacklog(0, STARTED + 17.0), ClockTicked(STARTED + 40.0))
    assert sum(c == SendToClient(b"\n") for c in outcome.commands) == 1


# --- The engine is paused -----------------------------------------------------------------------------


def test_the_engine_is_paused_at_half_the_buffer_and_read_again_when_there_is_room() -> None:
    outcome = lagging(content("x" * (BUFFER // 8)), policy=POLICY)
    assert outcome.count(PauseEngine) == 0
    outcome = lagging(content("x" * (BUFFER // 8)), content("x" * (BUFFER // 8)), content("y"))
    assert outcome.count(PauseEngine) == 1
    outcome.commands += outcome.exchange.receive(ROOM)
    assert outcome.count(ResumeEngine) == 1


def test_an_engine_that_speaks_after_another_is_paused_as_well() -> None:
    """The client still lags when the model is asked again after its tools were run."""
    another = EngineChosen("another", None, NOW)
    outcome = lagging(content("x" * (BUFFER // 2)), another, content("y"))
    assert outcome.count(PauseEngine) == 2


def test_a_paused_engine_that_still_speaks_does_not_cut_the_client_off() -> None:
    outcome = lagging(*repeat(content("x" * 1000), 100), *END)
    assert outcome.count(PauseEngine) == 1
    assert outcome.record.ending is Ending.COMPLETED
    assert len("".join(deltas(outcome))) == 100_001


def test_a_paused_engine_is_not_asked_for_its_health() -> None:
    silent = ClockTicked(STARTED + 31.0)
    progress = [ClientBacklog(BUFFER - 1, STARTED + 2.0), ClientBacklog(BUFFER - 2, STARTED + 30.0)]
    outcome = lagging(content("x" * BUFFER), *progress, silent)
    assert outcome.count(PauseEngine) == 1
    assert outcome.count(AskEngineHealth) == 0


def test_after_a_pause_the_silence_counts_from_its_end() -> None:
    ticks = [ClientBacklog(0, STARTED + 25.0), ClientBacklog(0, STARTED + 26.0), ClockTicked(STARTED + 32.0)]
    outcome = lagging(content("x" * BUFFER), *ticks)
    assert outcome.count(ResumeEngine) == 1
    assert outcome.count(AskEngineHealth) == 0


# --- The client is cut off ----------------------------------------------------------------------------


def test_without_a_pause_the_buffer_is_the_bound() -> None:
    outcome = lagging(*repeat(content("x" * 1000), 100), policy=without("pause"))
    error = outcome.one("error")
    assert (error["code"], error["retryable"], error["origin"]) == ("client_too_slow", True, "proxy")
    assert "limits.buffer_bytes" in error["message"]
    assert outcome.record.ending is Ending.CLIENT_TOO_SLOW
    assert outcome.count(AbortEngine) == 1
    assert BUFFER / 2 < len("".join(deltas(outcome))) < BUFFER, "what waited is still told"


def test_a_client_that_takes_nothing_is_cut_off_after_the_stall_time() -> None:
    unsent = STALLED.unsent
    ticks = [signal for second in (8, 16, 24) for signal in told_and_ticked(unsent, second)]
    outcome = lagging(*ticks)
    assert not outcome.exchange.is_over
    outcome = lagging(*ticks, *told_and_ticked(unsent, 30))
    error = outcome.one("error")
    assert (error["code"], error["retryable"]) == ("client_stalled", True)
    assert "slow_client.stall_seconds" in error["message"]
    assert outcome.record.ending is Ending.CLIENT_TOO_SLOW


def test_a_stream_that_is_kept_goes_on_without_the_client_that_was_cut_off() -> None:
    said = [content("a"), content("x" * (BUFFER // 2)), *told_and_ticked(STALLED.unsent, 30), content("b"), *END]
    outcome = lagging(*said, outlives_client=True)
    told = json.loads(outcome.only(CutClient).data)
    assert (told["type"], told["code"], told["retryable"]) == ("error", "client_stalled", True)
    assert "seq" not in told, "it is no event of the stream"
    assert "resume" in told["message"]
    assert outcome.count(PauseEngine) == outcome.count(ResumeEngine) == 1
    assert outcome.blocks() == ["text: =a" + "x" * (BUFFER // 2) + "b"]
    assert outcome.all_of("error") == []
    assert outcome.record.ending is Ending.COMPLETED


@pytest.mark.parametrize(
    ("dialect", "start", "end"), [("sse", b"event: error\ndata: {", b"}\n\n"), ("chat", b"data: {", b"[DONE]\n\n")]
)
def test_the_last_word_on_a_connection_is_spelled_in_its_dialect(dialect: Any, start: bytes, end: bytes) -> None:
    outcome = lagging(*told_and_ticked(STALLED.unsent, 30), outlives_client=True, dialect=dialect)
    data = outcome.only(CutClient).data
    assert data.startswith(start)
    assert data.endswith(end)
    assert b"client_stalled" in data
    assert b"id: " not in data


def told_and_ticked(unsent: int, second: float) -> list[Any]:
    return [ClientBacklog(unsent, NOW + second), ClockTicked(NOW + second)]


def test_a_client_that_takes_a_little_now_and_then_is_not() -> None:
    ticks = [s for n, second in enumerate((20, 40, 60)) for s in told_and_ticked(STALLED.unsent + 99 - n, second)]
    assert not lagging(ClientBacklog(STALLED.unsent + 100, NOW), *ticks).exchange.is_over


def test_without_cutting_a_client_may_stall_until_the_stream_s_own_limit() -> None:
    policy = without("cut")
    assert not lagging(*told_and_ticked(STALLED.unsent, 500), policy=policy).exchange.is_over
    outcome = lagging(*told_and_ticked(STALLED.unsent, 600), policy=policy)
    assert outcome.record.ending is Ending.TIME_LIMIT


def test_it_is_looked_at_more_often_than_the_stall_time() -> None:
    exchange = open_exchange(slow_client=POLICY)
    exchange.receive(EngineSpoke(role() + content("="), STARTED))
    commands = exchange.receive(STALLED)
    [wake] = [command for command in commands if isinstance(command, WakeAt)]
    assert NOW < wake.when <= NOW + POLICY.stall_seconds / 2


def test_a_backlog_before_the_first_byte_means_nothing() -> None:
    exchange = open_exchange(slow_client=without("pause"))
    assert exchange.receive(ClientBacklog(10 * BUFFER, NOW)) == []


def test_a_client_that_leaves_did_not_get_what_was_held() -> None:
    said = [content("held", tokens=3), reasoning("so", tokens=5), ClientLeft(NOW + 1.0)]
    record = lagging(*said, is_logged=False).record
    assert record.unsent_bytes == len("heldso")
    assert record.usage.sizes["delivered"] == len("=")
    assert (record.usage.completion_tokens, record.usage.delivered_tokens) == (5, 0)
    assert record.ending is Ending.CLIENT_GONE


def test_where_there_is_a_log_it_gets_it_when_it_comes_back() -> None:
    outcome = lagging(content("held", tokens=3), ClientLeft(NOW + 1.0))
    assert outcome.blocks() == ["text: =held"]
    assert outcome.record.unsent_bytes == 0
    assert outcome.record.usage.sizes["delivered"] == len("=held")
