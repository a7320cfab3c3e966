"""The journey and its endings, as transcripts: what the engine said, what the client got."""

import json
from typing import Any

import pytest

from penstock.core.commands import (
    AbortEngine,
    AskEngineHealth,
    Close,
    Ending,
    OpenClient,
    RecordUsage,
    Respond,
    SendToClient,
    WakeAt,
)
from penstock.core.errors import EngineError, LimitReached
from penstock.core.signals import (
    Broke,
    Cancelled,
    ClientLeft,
    ClockTicked,
    Draining,
    EngineAnswered,
    EngineClosed,
    EngineRefused,
    EngineSpoke,
    ReadAgain,
    Signal,
    Unread,
)
from support.chunks import (
    DONE,
    answer,
    answer_of,
    chunk,
    content,
    error,
    final_usage,
    finish,
    frame,
    reasoning,
    role,
    spoken,
    tool,
    whole,
)
from support.playbook import STARTED, STREAM_ID, Step, ask, open_exchange, play

WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
RESET = EngineError("engine_connection", "the connection was reset")


def at(seconds: float) -> float:
    """Monotonic time, this long after the request came."""
    return STARTED + seconds


# --- Success --------------------------------------------------------------------------------------


def test_a_plain_answer() -> None:
    outcome = play(ask(), answer_of(["Hel", "lo"]))
    assert outcome.types() == [
        "stream.start",
        "delta.role",
        "text.start",
        "delta.text",
        "text.end",
        "finish",
        "usage",
        "stream.end",
    ]
    assert outcome.blocks() == ["text: Hello"]
    assert outcome.finishes()[0] == {"choice": 0, "reason": "stop", "cause": "eos", "raw_reason": "stop"}
    assert outcome.record.ending is Ending.COMPLETED
    assert outcome.only(OpenClient).data == b"\n"


def test_the_start_tells_who_answers() -> None:
    start = play(ask(n=2), [role(), role(1), finish(), finish(choice=1), DONE]).one("stream.start")
    assert start["stream_id"] == STREAM_ID
    assert (start["schema"], start["model"], start["choices"], start["upstream"]) == ("1.0", "tiny", 2, "vllm")


def test_each_event_of_the_sse_spelling_is_named_and_numbered() -> None:
    outcome = play(ask(), answer_of(["Hi"]), dialect="sse")
    assert outcome.blocks() == ["text: Hi"]
    assert b"event: delta.text\nid: %b:4\ndata: {" % STREAM_ID.encode() in outcome.data
    assert outcome.data.startswith(b": ok\n\n")


def test_reasoning_answer_and_call_come_out_of_raw_text() -> None:
    outcome = play(
        ask(tools=["get_weather"]),
        answer_of(["<think>", "hmm", "</think>", "\n\nOne moment.\n", f"<tool_call>\n{WEATHER}\n</tool_call>"]),
    )
    assert outcome.blocks() == [
        "reasoning: hmm",
        "text: \n\nOne moment.\n",
        'tool_call: get_weather({"city": "Paris"})',
    ]
    assert outcome.one("tool_call.ready")["arguments"] == {"city": "Paris"}
    assert outcome.finishes()[0]["reason"] == "tool_calls"
    assert outcome.finishes()[0]["raw_reason"] == "stop"
    assert outcome.record.finish_reasons == ["tool_calls"]


def test_an_engine_that_parses_gives_the_same_blocks() -> None:
    call = [tool(call_id="c1", name="get_weather"), tool(arguments='{"city": '), tool(arguments='"Paris"}')]
    outcome = play(
        ask(tools=["get_weather"]),
        answer(reasoning("hmm"), content("One moment."), *call, reason="tool_calls"),
    )
    assert outcome.blocks() == [
        "reasoning: hmm",
        "text: One moment.",
        'tool_call: get_weather({"city": "Paris"})',
    ]
    assert outcome.one("tool_call.start")["call_id"] == "c1"


def test_hidden_reasoning_is_counted_and_not_sent() -> None:
    outcome = play(ask(), answer_of(["<think>se", "cret</think>", "Hi"]), reasoning="hide")
    assert outcome.blocks() == ["text: Hi"]
    assert b"cret" not in outcome.data
    assert outcome.usage()["bytes"]["hidden"] == len("secret")


def test_hidden_reasoning_leaves_no_trace_in_logprobs() -> None:
    steps = answer(
        content("<think>", logprobs=_logprobs("<think>"), token_ids=[1]),
        content("secret", logprobs=_logprobs("secret"), token_ids=[2]),
        content("</think>", logprobs=_logprobs("</think>"), token_ids=[3]),
        content("Hi", logprobs=_logprobs("Hi"), token_ids=[4]),
    )
    outcome = play(ask(), steps, reasoning="hide")
    assert b"secret" not in outcome.data
    assert outcome.one("delta.text")["token_ids"] == [3, 4]


def test_inlined_reasoning_is_answer_between_marks_and_counted_as_reasoning() -> None:
    steps = answer(*(content(text, tokens=n + 1) for n, text in enumerate(["<think>", "h", "mm", "</think>", "Hi"])))
    outcome = play(ask(), steps, reasoning="inline")
    assert outcome.blocks() == ["text: <think>hmm</think>Hi"]
    assert outcome.usage()["bytes"]["added"] == len("<think></think>")
    assert outcome.usage()["reasoning_tokens"] == 2


def test_inlined_reasoning_of_an_engine_that_splits_it() -> None:
    outcome = play(ask(), answer(reasoning("hmm"), content("Hi")), reasoning="inline")
    assert outcome.blocks() == ["text: <think>hmm</think>Hi"]


def test_two_choices_that_speak_in_turns() -> None:
    steps = [
        role(0) + role(1),
        content("a", 0) + content("<think>x", 1),
        content("b", 0) + content("</think>y", 1),
        finish("stop", 0),
        content("z", 1),
        finish("length", 1),
        final_usage(9),
        DONE,
    ]
    outcome = play(ask(n=2), steps)
    assert outcome.blocks(0) == ["text: ab"]
    assert outcome.blocks(1) == ["reasoning: x", "text: yz"]
    assert [outcome.finishes()[n]["reason"] for n in (0, 1)] == ["stop", "length"]
    assert outcome.one("stream.end")["finish_reasons"] == ["stop", "length"]
    assert outcome.one("stream.end")["status"] == "incomplete"


def test_a_refusal_is_text_that_says_so() -> None:
    outcome = play(ask(), answer(spoken({"refusal": "I will not."})))
    assert outcome.blocks() == ["text: I will not."]
    assert outcome.one("delta.text")["refusal"] is True


def test_text_and_refusal_are_never_merged_into_one_delta() -> None:
    outcome = play(ask(), [b"".join(answer(content("Hm. "), spoken({"refusal": "No."})))])
    assert [event.get("refusal") for event in outcome.all_of("delta.text")] == [None, True]


def test_an_answer_without_any_text_has_a_role_and_no_block() -> None:
    outcome = play(ask(), [role(), finish("length"), DONE])
    assert outcome.types() == ["stream.start", "delta.role", "finish", "usage", "stream.end"]
    assert outcome.one("stream.end")["status"] == "incomplete"


def test_the_engine_that_names_no_role_speaks_as_the_assistant() -> None:
    outcome = play(ask(), [content("Hi"), finish(), DONE])
    assert outcome.one("delta.role")["role"] == "assistant"


def test_a_block_that_the_length_cut_is_incomplete() -> None:
    outcome = play(ask(), answer_of(["Hello wor"], reason="length"))
    assert outcome.one("text.end")["status"] == "incomplete"
    assert outcome.finishes()[0]["cause"] == "max_tokens"


@pytest.mark.parametrize(
    ("raw", "stop", "reason", "cause"),
    [
        ("stop", None, "stop", "eos"),
        ("stop", "\n", "stop", "stop_string"),
        ("stop", 151643, "stop", "stop_token"),
        ("stop", 151645, "stop", "eos"),  # vLLM names the model's second end token
        ("stop", "grammar", "stop", "grammar"),
        ("length", None, "length", "max_tokens"),
        ("content_filter", None, "content_filter", None),
        ("repetition", None, "other", "repetition"),
        ("something_new", None, "other", None),
        ("function_call", None, "tool_calls", "eos"),
    ],
)
def test_what_the_engine_calls_its_end(raw: str, stop: Any, reason: str, cause: str | None) -> None:
    request = ask(stop=["\n"], stop_token_ids=[151643])
    finished = play(request, [content("Hi"), finish(raw, stop=stop), DONE]).finishes()[0]
    assert (finished["reason"], finished["cause"], finished["raw_reason"]) == (reason, cause, raw)
    assert finished.get("stop") == stop


def test_a_stop_string_of_that_name_is_no_cause() -> None:
    finished = play(ask(stop="grammar"), [content("Hi"), finish("stop", stop="grammar"), DONE]).finishes()[0]
    assert finished["cause"] == "stop_string"


# --- Usage ----------------------------------------------------------------------------------------


def test_the_engine_s_total_is_the_bill() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 3}}
    outcome = play(ask(), [role(), content("Hi"), finish(), final_usage(7, prompt=20, **details), DONE])
    usage = outcome.usage()
    assert (usage["prompt_tokens"], usage["cached_tokens"], usage["completion_tokens"]) == (20, 4, 7)
    assert usage["reasoning_tokens"] == 3
    assert usage["estimated"] is False


def test_running_counts_tell_tokens_by_channel() -> None:
    steps = [
        role(tokens=0),
        content("<think>", tokens=1),
        content("a", tokens=2),
        content("bc", tokens=4),
        content("</think>", tokens=5),
        content("Hi", tokens=6),
        finish(tokens=7),
        DONE,
    ]
    usage = play(ask(), steps).usage()
    assert (usage["reasoning_tokens"], usage["answer_tokens"], usage["completion_tokens"]) == (3, 1, 7)
    assert usage["prompt_tokens"] == 9
    assert usage["estimated"] is False, "the counts at the finishes are the total"


def test_without_any_count_the_bill_is_an_estimate() -> None:
    usage = play(ask(), [content("Hi"), finish(), DONE]).usage()
    assert usage["estimated"] is True
    assert usage["completion_tokens"] == 0


def test_two_choices_total_is_the_sum_at_their_finishes() -> None:
    steps = [content("a", 0, tokens=1), content("b", 1, tokens=1), finish(tokens=2), finish(choice=1, tokens=3), DONE]
    assert play(ask(n=2), steps).usage()["completion_tokens"] == 5


def test_the_total_is_summed_up_also_when_the_end_mark_is_missing() -> None:
    outcome = play(ask(), [content("a", tokens=1), finish(tokens=2), EngineClosed(None, at(1))])
    assert outcome.usage()["completion_tokens"] == 2
    assert outcome.usage()["estimated"] is False


def test_a_count_that_goes_back_is_not_counted_twice() -> None:
    steps = [content("a", tokens=5), content("b", tokens=2), content("c", tokens=6), finish(tokens=6), DONE]
    assert play(ask(), steps).usage()["answer_tokens"] == 6


@pytest.mark.parametrize("wrong", [-5, 2.5, True, "many", None, [1], 10**30, 2**63])
def test_a_count_that_is_no_count_is_none(wrong: Any) -> None:
    usage = {"prompt_tokens": wrong, "completion_tokens": wrong, "prompt_tokens_details": {"cached_tokens": wrong}}
    outcome = play(ask(), [content("a"), finish(), chunk(usage=usage), DONE])
    assert (outcome.usage()["prompt_tokens"], outcome.usage()["completion_tokens"]) == (0, 0)
    assert outcome.usage()["cached_tokens"] == 0


def test_a_tick_of_usage_once_a_second_where_tokens_came() -> None:
    spoke = [EngineSpoke(content("a", tokens=n), at(n * 0.4)) for n in range(1, 7)]
    outcome = play(ask(), [*spoke, finish(tokens=7), DONE])
    ticks = [event for event in outcome.all_of("usage") if not event["final"]]
    assert [tick["completion_tokens"] for tick in ticks] == [3, 6]


# --- Stop strings of Penstock ---------------------------------------------------------------------


def stopping(*stop: str, **options: Any) -> Any:
    return ask(penstock={"stop": list(stop), **options})


def test_a_stop_string_across_chunks_ends_the_answer_and_the_engine() -> None:
    outcome = play(stopping("END"), [role(), content("Hi E"), content("N"), content("D and more")])
    assert outcome.blocks() == ["text: Hi "]
    assert outcome.finishes()[0] == {
        "choice": 0,
        "reason": "stop",
        "cause": "stop_string",
        "raw_reason": "stop",
        "stop": "END",
    }
    assert outcome.count(AbortEngine) == 1
    assert outcome.record.ending is Ending.COMPLETED
    assert outcome.usage()["bytes"]["stop"] == len("END and more")


def test_a_stop_string_may_be_included() -> None:
    outcome = play(stopping("END", include_stop=True), [content("Hi E"), content("ND and more")])
    assert outcome.blocks() == ["text: Hi END"]


def test_half_a_stop_string_is_released_when_something_else_begins() -> None:
    outcome = play(stopping("END"), answer(content("Hi EN"), reasoning("x"), content("D")))
    assert outcome.blocks() == ["text: Hi EN", "reasoning: x", "text: D"]


def test_half_a_stop_string_at_the_end_is_text() -> None:
    assert play(stopping("END"), answer_of(["Hi EN"])).blocks() == ["text: Hi EN"]


def test_half_a_stop_string_where_the_stream_breaks_off_is_text() -> None:
    assert play(stopping("END"), [content("Hi EN"), error()]).blocks() == ["text: Hi EN"]
    assert play(stopping("END"), [content("Hi EN"), ClientLeft(at(1))]).blocks() == ["text: Hi EN"]


def test_fields_that_the_engine_repeats_do_not_break_a_stop_string() -> None:
    pieces = ("Hi E", "N", "D!")
    steps = [spoken({"role": "assistant", "content": piece, "x": 1}, routed_experts=[1]) for piece in pieces]
    outcome = play(stopping("END"), steps)
    assert outcome.blocks() == ["text: Hi "]


def test_reasoning_is_not_searched_for_stop_strings() -> None:
    said = {"separate": "text: Hi ", "hide": "text: Hi ", "inline": "text: <think>END</think>Hi "}
    for policy, text in said.items():
        outcome = play(stopping("<", "END", reasoning=policy), answer_of(["<think>END</think>", "Hi END"]))
        assert outcome.blocks()[-1] == text


def test_what_a_stopped_choice_adds_later_is_counted_but_added_marks_are_not() -> None:
    steps = [content("a END", 0), reasoning("more", 0), content("b", 0), content("c", 1), finish(choice=1), DONE]
    outcome = play({**stopping("END", reasoning="inline"), "n": 2}, steps)
    assert outcome.blocks(0) == ["text: a "]
    assert outcome.usage()["bytes"]["stop"] == len("ENDmoreb")
    assert outcome.usage()["bytes"]["added"] == 0


def test_only_when_every_choice_stopped_the_engine_is_let_go() -> None:
    outcome = play({**stopping("END"), "n": 2}, [content("a END", 0), content("b", 1)])
    assert not outcome.exchange.is_over
    outcome = play({**stopping("END"), "n": 2}, [content("a END", 0), content("b END", 1)])
    assert outcome.record.finish_reasons == ["stop", "stop"]


def test_a_call_that_is_open_when_the_answer_stops_is_ended() -> None:
    steps = [tool(call_id="c1", name="f", arguments='{"a": '), content("END"), tool(arguments="1}"), DONE]
    outcome = play({**stopping("END"), "tools": ask(tools=["f"])["tools"]}, steps)
    assert outcome.one("tool_call.end")["valid"] is False
    assert outcome.finishes()[0]["cause"] == "stop_string"


# --- What travels with the text -------------------------------------------------------------------


def _logprobs(token: str) -> dict[str, Any]:
    return {"content": [{"token": token, "logprob": -1.0, "bytes": list(token.encode()), "top_logprobs": []}]}


@pytest.mark.parametrize("pieces", [["<thi", "nk>hmm</th", "ink>\n", "\n", "Hi", "<"], ["<", "a", "E", "N", "x"]])
def test_logprobs_and_token_ids_travel_with_held_text(pieces: list[str]) -> None:
    spoke = [content(p, logprobs=_logprobs(p), token_ids=[n], tokens=n + 1) for n, p in enumerate(pieces)]
    outcome = play(stopping("END"), [*spoke, finish(tokens=9, token_ids=[99], logprobs=_logprobs("")), DONE])
    carriers = [event for event in outcome.events if "token_ids" in event]
    assert [n for event in carriers for n in event["token_ids"]] == [*range(len(pieces)), 99]
    assert [entry["token"] for event in carriers for entry in event["logprobs"]] == [*pieces, ""]
    assert outcome.usage()["completion_tokens"] == 9


def test_logprobs_of_a_stop_string_go_with_the_finish() -> None:
    steps = [content("E", token_ids=[1], tokens=1), content("ND", token_ids=[2], tokens=2)]
    outcome = play(stopping("END"), steps)
    assert outcome.one("finish")["token_ids"] == [1, 2]
    assert outcome.blocks() == []


def test_tokens_without_text_travel_with_the_next_text() -> None:
    steps = [content("", token_ids=[1], tokens=1), content("", token_ids=[2], tokens=2), content("🙂", tokens=3)]
    outcome = play(ask(), [*steps, finish(tokens=4), DONE])
    assert outcome.one("delta.text")["token_ids"] == [1, 2]
    assert outcome.usage()["answer_tokens"] == 3


def test_unknown_fields_go_to_ext_of_the_next_event_of_their_choice() -> None:
    steps = [
        role(),
        spoken({"content": "Hi", "annotations": ["a"]}, matched_stop=5, unset=None),
        chunk({"index": 0, "delta": {"content": "!"}}, service_tier="fast"),
        finish(),
        DONE,
    ]
    outcome = play(ask(), steps)
    first, second = outcome.all_of("delta.text")
    assert first["ext"] == {"annotations": ["a"], "matched_stop": 5}
    assert second["ext"] == {"service_tier": "fast"}


def test_ext_of_a_choice_waits_for_that_choice() -> None:
    steps = [spoken({"content": "<thi", "x": 1}, choice=1), content("Hi", 0), content("!", 1)]
    outcome = play(ask(n=2), [*steps, finish(), finish(choice=1), DONE])
    assert [event["choice"] for event in outcome.events if "ext" in event] == [1]


def test_what_is_left_of_ext_goes_with_the_end() -> None:
    outcome = play(ask(), [content("Hi"), finish(), chunk(late="x"), DONE])
    assert outcome.all_of("usage")[-1]["ext"] == {"late": "x"}


def test_an_engine_that_sends_ever_new_fields_is_not_remembered_without_bound() -> None:
    outcome = play(ask(), [*(frame({"choices": [], f"f{n}": n}) for n in range(500)), *answer_of(["Hi"])])
    assert len(outcome.one("delta.role")["ext"]) <= 65


# --- Tool calls of an engine that parses them -----------------------------------------------------


def calls(*steps: bytes, reason: str = "tool_calls", tools: tuple[str, ...] = ("f", "g")) -> Any:
    return play(ask(tools=list(tools)), [role(), *steps, finish(reason), DONE])


def test_the_arguments_may_come_before_the_name() -> None:
    outcome = calls(tool(call_id="c1", arguments='{"a"', tokens=1), tool(name="f", arguments=": 1}", tokens=3))
    assert outcome.blocks() == ['tool_call: f({"a": 1})']
    assert outcome.one("tool_call.start")["call_id"] == "c1"
    assert outcome.usage()["tool_tokens"] == 3


def test_a_call_without_an_id_gets_one() -> None:
    outcome = calls(tool(name="f", arguments="{}"))
    assert outcome.one("tool_call.start")["call_id"].startswith("call_")


def test_an_id_that_comes_late_or_again_does_not_make_a_second_call() -> None:
    outcome = calls(tool(name="f"), tool(call_id="c1", arguments="{"), tool(call_id="c1", arguments="}"))
    assert outcome.blocks() == ["tool_call: f({})"]


def test_two_calls_with_the_same_id_are_two_calls() -> None:
    outcome = calls(
        tool(0, call_id="c", name="f", arguments="{"),
        tool(0, call_id="c", arguments="}"),
        tool(1, call_id="c", name="g", arguments="{"),
        tool(1, call_id="c", arguments="}"),
    )
    assert outcome.blocks() == ["tool_call: f({})", "tool_call: g({})"]
    assert len({event["call_id"] for event in outcome.all_of("tool_call.start")}) == 2


def test_calls_that_all_have_index_0_are_told_apart_by_their_ids() -> None:
    outcome = calls(
        tool(0, call_id="c1", name="f", arguments='{"a": 1}'),
        tool(0, call_id="c2", name="g", arguments="{"),
        tool(0, arguments="}"),
    )
    assert outcome.blocks() == ['tool_call: f({"a": 1})', "tool_call: g({})"]
    assert [event["index"] for event in outcome.all_of("tool_call.start")] == [0, 1]


def test_two_calls_at_index_0_without_arguments() -> None:
    outcome = calls(tool(0, call_id="c1", name="f"), tool(0, call_id="c2", name="g"))
    assert outcome.blocks() == ["tool_call: f()", "tool_call: g()"]
    assert [event["arguments"] for event in outcome.all_of("tool_call.ready")] == [{}, {}]


def test_two_calls_at_index_0_without_ids_but_with_text_between() -> None:
    outcome = calls(tool(0, name="f", arguments="{}"), content("and"), tool(0, name="g", arguments="{}"))
    assert outcome.blocks() == ["tool_call: f({})", "text: and", "tool_call: g({})"]


def test_arguments_as_an_object_are_written_as_text() -> None:
    outcome = calls(tool(call_id="c1", name="f", arguments={"a": [1]}))
    assert outcome.one("tool_call.ready")["arguments"] == {"a": [1]}


def test_an_empty_object_of_arguments() -> None:
    assert calls(tool(call_id="c1", name="f", arguments={})).one("tool_call.end")["arguments"] == "{}"


def test_a_call_without_arguments_is_ready_with_the_empty_object() -> None:
    outcome = calls(tool(call_id="c1", name="f"))
    assert outcome.one("tool_call.ready")["arguments"] == {}
    assert outcome.one("tool_call.end")["arguments"] == ""


def test_a_call_cut_before_its_arguments_is_never_ready() -> None:
    outcome = calls(tool(call_id="c1", name="f"), reason="length")
    assert outcome.all_of("tool_call.ready") == []
    assert outcome.one("tool_call.end")["status"] == "incomplete"


def test_a_call_cut_within_its_arguments_is_never_ready() -> None:
    outcome = calls(tool(call_id="c1", name="f", arguments='{"a": 1'), reason="length")
    assert outcome.all_of("tool_call.ready") == []
    assert outcome.one("tool_call.end")["problem"].startswith("the arguments are not JSON")


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("f", "[1]", "the arguments are not a JSON object"),
        ("f", "{'a': 1}", "the arguments are not JSON"),
        ("other", "{}", "the request offers no tool called 'other'"),
        (None, "{}", "the model named no tool"),
    ],
)
def test_a_call_that_is_not_valid_says_why(name: str | None, arguments: str, problem: str) -> None:
    outcome = calls(tool(call_id="c1", name=name, arguments=arguments))
    assert outcome.all_of("tool_call.ready") == []
    assert outcome.one("tool_call.end")["problem"].startswith(problem)
    assert outcome.one("tool_call.end")["status"] == "complete"


def test_an_incomplete_call_stays_open_under_text_and_goes_on() -> None:
    outcome = calls(tool(call_id="c1", name="f", arguments='{"a"'), content("hm"), tool(arguments=": 1}"))
    assert outcome.one("tool_call.ready")["arguments"] == {"a": 1}
    assert outcome.blocks() == ['tool_call: f({"a": 1})', "text: hm"]


def test_parallel_calls_may_be_interleaved() -> None:
    outcome = calls(
        tool(0, call_id="c1", name="f", arguments='{"a"'),
        tool(1, call_id="c2", name="g", arguments='{"b"'),
        tool(0, arguments=": 1}"),
        tool(1, arguments=": 2}"),
    )
    assert outcome.blocks() == ['tool_call: f({"a": 1})', 'tool_call: g({"b": 2})']


def test_arguments_after_the_end_of_a_call_are_counted_and_said() -> None:
    late = [tool(arguments=" "), tool(arguments="y")]
    outcome = calls(tool(call_id="c1", name="f", arguments="{}"), content("x"), *late)
    assert [event["code"] for event in outcome.all_of("warning")] == ["late_arguments"]
    assert outcome.usage()["bytes"]["marker"] == 2


# --- Endings --------------------------------------------------------------------------------------


def test_a_finish_that_is_repeated_is_told_once() -> None:
    outcome = play(ask(), [content("Hi"), finish(), finish("length"), finish(), DONE])
    assert outcome.finishes()[0]["reason"] == "stop"
    assert outcome.all_of("warning") == []


def test_what_comes_after_a_finish_is_dropped_and_said_once() -> None:
    outcome = play(ask(), [content("Hi"), finish(), content("more"), reasoning("and"), tool(name="f"), DONE])
    assert outcome.blocks() == ["text: Hi"]
    assert [event["code"] for event in outcome.all_of("warning")] == ["after_finish"]


def test_nothing_is_read_after_the_end_mark() -> None:
    outcome = play(ask(), [content("Hi"), finish(), DONE + content("more") + error(), content("again")])
    assert outcome.record.ending is Ending.COMPLETED
    assert outcome.blocks() == ["text: Hi"]


def test_finished_without_the_end_mark_is_complete_with_a_warning() -> None:
    outcome = play(ask(), [content("Hi"), finish(), EngineClosed(None, at(1))])
    assert outcome.record.ending is Ending.COMPLETED
    assert outcome.one("warning")["code"] == "missing_done"
    assert outcome.one("stream.end")["status"] == "completed"


@pytest.mark.parametrize("steps", [[DONE], [EngineClosed(None, at(1))]], ids=["end mark", "closed"])
def test_an_end_without_a_finish_is_never_success(steps: list[Any]) -> None:
    outcome = play(ask(), [role(), content("Hi"), *steps])
    assert outcome.one("error")["code"] == "engine_incomplete"
    assert outcome.one("error")["retryable"] is True
    assert outcome.finishes()[0]["reason"] == "error"
    assert outcome.one("text.end")["status"] == "incomplete"
    assert outcome.one("stream.end")["status"] == "failed"


def test_one_choice_of_two_unfinished_is_never_success() -> None:
    outcome = play(ask(n=2), [content("a"), content("b", 1), finish(), DONE])
    assert [outcome.finishes()[n]["reason"] for n in (0, 1)] == ["stop", "error"]


def test_an_empty_stream_is_an_error_status() -> None:
    outcome = play(ask(), [DONE])
    assert outcome.only(Respond).status == 502
    assert outcome.body["error"]["code"] == "engine_incomplete"
    assert outcome.record.ending is Ending.ENGINE_ERROR


def test_an_error_in_the_middle_of_the_stream() -> None:
    outcome = play(ask(), [role(), content("Hi <thi"), error("KV cache exhausted")])
    told = outcome.one("error")
    assert (told["code"], told["message"], told["origin"]) == ("engine_error", "KV cache exhausted", "upstream")
    assert outcome.blocks() == ["text: Hi <thi"], "what was held is not lost"
    assert outcome.types()[-5:] == ["error", "text.end", "finish", "usage", "stream.end"]
    assert outcome.commands[-1] == Close()
    assert outcome.record.error_code == "engine_error"


def test_an_error_as_the_first_frame_is_a_real_http_status() -> None:
    outcome = play(ask(), [error("too long", code=400)])
    assert outcome.only(Respond).status == 400
    assert outcome.body["error"]["message"] == "too long"
    assert outcome.body["error"]["retryable"] is False
    assert outcome.count(OpenClient) == 0


def test_an_error_as_the_first_frame_is_the_engine_s_own_words_to_an_openai_client() -> None:
    outcome = play(ask(), [error("too long", code=400)], dialect="chat")
    assert outcome.body == {"error": {"message": "too long", "type": "InternalServerError", "param": None, "code": 400}}


@pytest.mark.parametrize("code", [429, 408, 500, None, "insufficient_quota"])
def test_which_engine_errors_may_be_tried_again(code: Any) -> None:
    outcome = play(ask(), [role(), frame({"error": {"message": "x", "code": code}})])
    assert outcome.one("error")["retryable"] is True


@pytest.mark.parametrize(
    ("envelope", "message"),
    [
        ({"object": "error", "message": "old", "code": 404}, "old"),
        ({"error": "only words"}, "only words"),
        ({"error": {"code": 500}}, "the engine reported an error without a message"),
        ({"error": {"message": ["not", "text"]}}, "the engine reported an error without a message"),
        ({"error": 5}, "the engine reported an error without a message"),
    ],
)
def test_every_kind_of_error_envelope(envelope: Any, message: str) -> None:
    assert play(ask(), [role(), frame(envelope)]).one("error")["message"] == message


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_engine_that_gives_up_is_an_error_not_a_finish(reason: str) -> None:
    steps = [content("Hi", tokens=1), finish(reason, tokens=2) + final_usage(9) + DONE]
    outcome = play(ask(), steps)
    assert outcome.one("error")["code"] == f"engine_{reason}"
    assert outcome.finishes()[0]["reason"] == "error"
    assert outcome.usage()["completion_tokens"] == 2


def test_a_whole_call_of_an_engine_that_gives_up_is_not_ready() -> None:
    outcome = calls(tool(call_id="c1", name="f", arguments="{}"), reason="abort")
    assert outcome.all_of("tool_call.ready") == []
    assert outcome.one("tool_call.end")["problem"] == "the stream ended before the call did"


def test_two_choices_that_the_engine_gives_up_are_one_error() -> None:
    outcome = play(ask(n=2), [content("a") + content("b", 1) + finish("abort") + finish("abort", 1)], dialect="chat")
    assert outcome.data.count(b'"error"') == 1


@pytest.mark.parametrize(
    ("signal", "code", "ending"),
    [
        (EngineClosed(RESET, at(1)), "engine_connection", Ending.ENGINE_GONE),
        (Draining(at(1)), "draining", Ending.DRAINING),
        (Broke(at(1)), "internal_error", Ending.OUR_BUG),
        (ClockTicked(at(600)), "stream_time_limit", Ending.TIME_LIMIT),
    ],
)
def test_every_other_way_to_break_off(signal: Signal, code: str, ending: Ending) -> None:
    call = tool(call_id="c1", name="f", arguments='{"a"')
    steps: list[Step] = [content("<think>hm"), call, content("Hi <"), signal, DONE]
    outcome = play(ask(tools=["f"]), steps)
    assert outcome.one("error")["code"] == code
    assert outcome.record.ending is ending
    assert outcome.record.error_code == code
    assert outcome.count(AbortEngine) == 1
    assert outcome.one("tool_call.end")["status"] == "incomplete"


@pytest.mark.parametrize(
    ("signal", "status"),
    [
        (EngineClosed(RESET, at(1)), 502),
        (Draining(at(1)), 503),
        (Broke(at(1)), 500),
        (ClockTicked(at(600)), 504),
        (EngineRefused(400, b'{"error": {"message": "no", "code": 400}}', at(1)), 400),
        (EngineRefused(429, b"slow down", at(1)), 429),
        (EngineRefused(302, b"", at(1)), 502),
    ],
)
@pytest.mark.parametrize("dialect", ["ndjson", "sse", "folded", "chat", "chat_whole"])
def test_before_the_first_byte_a_failure_is_an_http_status(signal: Signal, status: int, dialect: Any) -> None:
    outcome = play(ask(), [signal], dialect=dialect)
    assert outcome.only(Respond).status == status
    assert outcome.body["error"]["message"]
    assert outcome.commands[-1] == Close()


def test_text_that_was_held_before_an_error_status_is_billed_as_unsent() -> None:
    outcome = play(ask(), [content("<thi"), Draining(at(1))])
    assert outcome.only(Respond).status == 503
    assert outcome.record.unsent_bytes == 4


def test_after_the_first_byte_the_same_failure_is_an_event() -> None:
    outcome = play(ask(), [ClockTicked(at(1)), EngineRefused(500, b"", at(2))])
    assert outcome.one("error")["code"] == "engine_refused"
    assert outcome.types() == ["stream.start", "error", "finish", "usage", "stream.end"]


def test_a_cancelled_stream_says_so_and_is_no_failure() -> None:
    outcome = play(ask(), [content("Hi"), Cancelled(at(1))])
    assert outcome.finishes()[0]["reason"] == "cancelled"
    assert outcome.one("stream.end")["status"] == "cancelled"
    assert outcome.all_of("error") == []
    assert outcome.record.ending is Ending.CANCELLED


def test_a_stream_cancelled_before_its_first_token_is_whole() -> None:
    outcome = play(ask(), [Cancelled(at(0.5))])
    assert outcome.types() == ["stream.start", "finish", "usage", "stream.end"]


def test_tokens_after_the_cancel_are_wasted() -> None:
    outcome = play(ask(), [content("Hi", tokens=3), final_usage(5), Cancelled(at(1))])
    assert outcome.usage()["wasted_tokens_after_cancel"] == 2


def test_what_a_client_that_left_would_have_got_is_told_to_the_log_and_billed() -> None:
    outcome = play(ask(), [role(), content("<thi", tokens=2), ClientLeft(at(1)), content("nk>")])
    assert [type(command) for command in outcome.commands[-4:]] == [AbortEngine, SendToClient, RecordUsage, Close]
    assert outcome.record.ending is Ending.CLIENT_GONE
    assert outcome.record.usage.completion_tokens == 2
    assert outcome.blocks() == ["text: <thi"]
    assert outcome.one("stream.end")["status"] == "cancelled"


def test_a_client_that_left_before_the_head_was_sent_is_billed() -> None:
    outcome = play(ask(), [ClientLeft(at(0.1))])
    assert [type(command) for command in outcome.commands[-3:]] == [AbortEngine, RecordUsage, Close]
    assert outcome.record.ending is Ending.CLIENT_GONE


def test_after_the_end_nothing_is_answered() -> None:
    exchange = open_exchange()
    exchange.receive(ClientLeft(at(1)))
    assert exchange.is_over
    assert exchange.receive(Cancelled(at(2))) == []


# --- Limits and time ------------------------------------------------------------------------------


def test_the_cap_on_bytes() -> None:
    outcome = play(ask(), [role(), *(content("x" * 100) for _ in range(100))], stream_bytes=2000)
    assert outcome.one("error")["code"] == "stream_bytes_limit"
    assert outcome.record.ending is Ending.CAP_REACHED
    assert 2000 <= len(outcome.data) < 4000


def test_the_cap_holds_for_hidden_text_and_for_a_folded_answer() -> None:
    flood = [content("<think>"), *(content("x" * 100) for _ in range(100))]
    assert play(ask(), flood, stream_bytes=2000, reasoning="hide").record.ending is Ending.CAP_REACHED
    folded = play(ask(), flood, stream_bytes=2000, dialect="folded")
    assert folded.only(Respond).status == 413
    assert folded.body["error"]["code"] == "stream_bytes_limit"


def test_a_line_without_end() -> None:
    steps: list[Step] = [role() + content("Hi") + b"data: " + b"x" * 999, b"y" * 999]
    outcome = play(ask(), steps, line_bytes=1000)
    assert outcome.one("error")["code"] == "engine_line_too_long"
    assert outcome.blocks() == ["text: Hi"], "what came before it is not lost"


def test_a_heartbeat_for_a_client_that_waits() -> None:
    outcome = play(ask(), [ClockTicked(at(0.5)), ClockTicked(at(1)), ClockTicked(at(16)), ClockTicked(at(20))])
    assert [c for c in outcome.commands if isinstance(c, OpenClient | SendToClient)] == [
        OpenClient(b"\n"),
        SendToClient(b"\n"),
    ]
    wakes = [command.when - STARTED for command in outcome.commands if isinstance(command, WakeAt)]
    assert wakes == [1, 1, 16, 30, 30]


def test_no_heartbeat_where_text_flows() -> None:
    spoke: list[Step] = [EngineSpoke(content("a"), at(10)), ClockTicked(at(16)), EngineSpoke(content("b"), at(20))]
    outcome = play(ask(), [role(), *spoke, ClockTicked(at(34))])
    assert SendToClient(b"\n") not in outcome.commands


def test_a_whole_answer_has_no_heartbeats() -> None:
    outcome = play(ask(), [ClockTicked(at(1)), ClockTicked(at(20))], dialect="folded")
    assert outcome.count(OpenClient) == outcome.count(SendToClient) == 0


def test_the_engine_is_asked_for_its_health_once_a_silence() -> None:
    ticks = [ClockTicked(at(29)), ClockTicked(at(30)), ClockTicked(at(40)), ClockTicked(at(60))]
    outcome = play(ask(), [role(), *ticks])
    assert outcome.count(AskEngineHealth) == 2


def test_the_time_to_the_first_token_is_measured() -> None:
    outcome = play(ask(), [role(), EngineSpoke(content("a"), at(0.25)), EngineSpoke(finish() + DONE, at(2))])
    assert outcome.one("stream.end")["ttft_ms"] == 250
    assert outcome.one("stream.end")["duration_ms"] == 2000
    assert outcome.record.ttft_seconds == pytest.approx(0.25)


# --- Whole answers --------------------------------------------------------------------------------


def test_the_folded_answer_is_the_stream_added_up() -> None:
    steps = answer_of(["<think>hm</think>Hi ", f"<tool_call>{WEATHER}</tool_call>"])
    body = play(ask(tools=["get_weather"]), steps, dialect="folded").body
    assert body["status"] == "completed"
    assert [block["type"] for block in body["choices"][0]["blocks"]] == ["reasoning", "text", "tool_call"]
    assert body["choices"][0]["blocks"][2]["arguments"] == {"city": "Paris"}
    assert body["choices"][0]["text"] == "Hi "


def test_a_folded_answer_that_fails_has_the_status_of_its_error() -> None:
    outcome = play(ask(), [role(), content("Hi"), error("dead", 503)], dialect="folded")
    assert outcome.only(Respond).status == 503
    assert outcome.body["status"] == "failed"
    assert outcome.body["choices"][0]["text"] == "Hi"


def test_an_engine_that_does_not_stream_fills_a_native_stream() -> None:
    message = {"content": "<think>hm</think>Hi"}
    outcome = play(ask(), [EngineAnswered(whole(message), at(1))])
    assert outcome.blocks() == ["reasoning: hm", "text: Hi"]
    assert outcome.usage()["completion_tokens"] == 7


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"\xff", b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}'])
def test_a_whole_answer_that_is_none(body: bytes) -> None:
    outcome = play(ask(), [EngineAnswered(body, at(1))], dialect="chat_whole")
    assert outcome.only(Respond).status == 502


def test_an_error_in_a_whole_answer() -> None:
    body = json.dumps({"error": {"message": "no", "code": 400}}).encode()
    outcome = play(ask(), [EngineAnswered(body, at(1))], dialect="chat_whole")
    assert outcome.only(Respond).status == 400
    assert outcome.body["error"]["message"] == "no"


def test_a_limit_of_the_shell_comes_through() -> None:
    problem = LimitReached("stream_bytes_limit", "too large")
    assert play(ask(), [EngineClosed(problem, at(1))], dialect="chat_whole").only(Respond).status == 413


# --- Engines that do not keep to the protocol -----------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: \xff\xfe\n\n",
        b'data: {"choices": 5}\n\n',
        b'data: {"choices": [5]}\n\n',
        b'data: {"choices": [], "usage": [1]}\n\n',
        b'data: {"a": NaN}\n\n',
        chunk({"index": -1, "delta": {"content": "x"}}),
        chunk({"index": 5, "delta": {"content": "x"}}),
        chunk({"index": None, "delta": {"content": "x"}}),
        chunk({"index": 0, "delta": ["x"]}),
        spoken({"role": 5}),
        spoken({"content": ["x"]}),
        spoken({"content": "x"}, logprobs=[1]),
        spoken({"content": "x"}, logprobs={"content": "x"}),
        spoken({"content": "x"}, token_ids={"a": 1}),
        spoken({"tool_calls": [{"index": "0", "function": {"name": "f"}}]}),
        spoken({"tool_calls": [{"index": 0, "function": {"name": {}}}]}),
        spoken({"tool_calls": [{"index": 0, "id": [], "function": {"name": 5}}]}),
        spoken({"tool_calls": [{"index": 0, "id": {"a": 1}, "function": {"name": "f"}}]}),
        spoken({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": [1]}}]}),
        finish("stop", stop={"a": 1}),
        finish("stop", stop=True),
        spoken({}, finish_reason=5),
        spoken({}, finish_reason={"a": 1}),
        b"data: " + b"[" * 100_000 + b"\n\n",
        b'data: {"x": ' + b"[" * 600 + b"]" * 600 + b"}\n\n",
    ],
)
def test_a_chunk_of_another_shape_is_one_error(bad: bytes) -> None:
    outcome = play(ask(tools=["f"]), [role(), content("Hi"), bad, content("more"), DONE])
    assert outcome.one("error")["code"] == "engine_malformed"
    assert outcome.blocks() == ["text: Hi"]


@pytest.mark.parametrize("name", ["id", "model", "created"])
def test_a_first_chunk_of_another_shape_is_an_error_status(name: str) -> None:
    assert play(ask(), [frame({name: ["x"], "choices": []})]).only(Respond).status == 502


def test_empty_events_are_nothing() -> None:
    outcome = play(ask(), [b"data:\n\n", b"data:  \n\n", *answer_of(["Hi"])])
    assert outcome.blocks() == ["text: Hi"]


def test_an_error_body_nested_too_deeply_is_not_passed_on() -> None:
    body = b'{"error": {"message": "no", "x": ' + b"[" * 600 + b"]" * 600 + b"}}"
    outcome = play(ask(), [EngineRefused(400, body, at(1))], dialect="chat")
    assert outcome.body["error"]["code"] == "engine_refused"


@pytest.mark.parametrize("dialect", ["ndjson", "sse", "folded", "chat"])
def test_lone_surrogates_anywhere(dialect: Any) -> None:
    lone = "a\ud83d"
    steps = [
        spoken({"role": lone, "content": lone, "x": {"content": lone}}, y=lone, logprobs={"content": [lone]}),
        chunk({"index": 0, "delta": {"content": "b"}}, z=[lone], id=lone),
        tool(call_id=lone, name=lone, arguments='{"a": "' + lone),
        tool(arguments='\ude00"}'),
        finish("stop", stop=lone),
        chunk(usage={"prompt_tokens": 1, "x": lone}),
        DONE,
    ]
    outcome = play(ask(tools=["a?"]), steps, dialect=dialect)
    assert outcome.record.ending is Ending.COMPLETED
    if outcome.events:
        assert outcome.blocks() == ["text: ab", 'tool_call: a?({"a": "a😀"})']
        assert outcome.one("warning")["code"] == "invalid_unicode"


@pytest.mark.parametrize("dialect", ["ndjson", "sse", "folded", "chat"])
def test_arguments_nested_deeper_than_can_be_written_are_passed_as_text(dialect: Any) -> None:
    deep = '{"a": ' + "[" * 500 + "]" * 500 + "}"
    steps = answer(tool(call_id="c1", name="f", arguments=deep), reason="tool_calls")
    outcome = play(ask(tools=["f"]), steps, dialect=dialect)
    assert outcome.record.ending is Ending.COMPLETED


def test_numbers_larger_than_any_that_can_be_written() -> None:
    huge = "1" * 5000
    body = b'data: {"choices": [{"index": 0, "delta": {"content": "a\\ud83d"}}], "x": %b}\n\n' % huge.encode()
    assert play(ask(), [body, finish(), DONE]).record.ending is Ending.COMPLETED


def test_a_call_in_another_order_with_a_number_that_python_will_not_read() -> None:
    call = '<tool_call>{"arguments": {"a": ' + "1" * 5000 + '}, "name": "f"}</tool_call>'
    outcome = play(ask(tools=["f"]), answer_of([call]))
    assert outcome.record.ending is Ending.COMPLETED


# --- Nobody reads for a while -------------------------------------------------------------------------


def test_what_a_stream_said_to_nobody_is_counted_when_nobody_came_back() -> None:
    said: list[bytes | Signal] = [
        role(),
        content("a", tokens=3),
        Unread(STARTED),
        content("b", tokens=8),
        ClientLeft(STARTED + 60.0),
    ]
    usage = play(ask(), said).record.usage
    assert (usage.completion_tokens, usage.wasted_tokens_after_cancel) == (8, 5)


def test_whoever_comes_back_wants_it_all() -> None:
    said: list[bytes | Signal] = [role(), content("a", tokens=3), Unread(STARTED), content("b", tokens=8)]
    outcome = play(ask(), [*said, ReadAgain(STARTED + 1.0), content("c", tokens=9), Cancelled(STARTED + 2.0)])
    assert outcome.record.usage.wasted_tokens_after_cancel == 0
