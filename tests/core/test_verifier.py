"""The verifier accepts good logs and refuses broken ones, each for the right reason."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core import sse
from penstock.core.verifier import LogError, Verifier, parse_log, verify

BROKEN_LOGS = Path(__file__).parent.parent / "vectors" / "broken_logs"
GUARANTEES = {"G1", "G2", "G3", "G4", "G5", "G6", "schema", "ts", "tool_call", "usage", "error", "status"}

Event = dict[str, Any]
Log = list[Event]
Mutation = Callable[[Log], None]


# --- Good logs ------------------------------------------------------------------------------------


def numbered(*events: Event) -> Log:
    """The events with their envelopes, one millisecond apart."""
    return [{"stream_id": "st_1", "seq": n, "ts": 1000 + n, **event} for n, event in enumerate(events, 1)]


def event(name: str, choice: Any = None, block: int | None = None, /, **fields: Any) -> Event:
    place = {"choice": choice, "block": block}
    return {"type": name, **{key: value for key, value in place.items() if value is not None}, **fields}


def start(choices: int) -> Event:
    fields: Event = {"schema": "1.0", "model": "tiny", "upstream": "vllm", "trace_id": None, "resumable_until": None}
    return event("stream.start", choices=choices, **fields)


def usage(generated: int, delivered: int, *, marker: int = 0, final: bool) -> Event:
    names = ("prompt", "cached", "completion", "reasoning", "answer", "tool", "delivered")
    sizes = {"generated": generated, "added": 0, "delivered": delivered, "marker": marker}
    sizes |= {"hidden": 0, "stop": 0, "moderation": 0}
    counts = {f"{name}_tokens": 5 for name in names} | {"wasted_tokens_after_cancel": 0}
    return event("usage", **counts, estimated=False, bytes=sizes, final=final)


def finish(choice: int, reason: str, **fields: Any) -> Event:
    return event("finish", choice, reason=reason, cause=None, raw_reason=None, **fields)


def end(status: str, reasons: list[str], events: int) -> Event:
    return event("stream.end", status=status, finish_reasons=reasons, events=events, duration_ms=30, ttft_ms=None)


def rich_log() -> Log:
    """Two choices with everything: reasoning, text, two calls of which one waits under the other, a warning."""
    return numbered(
        start(choices=2),
        event("delta.role", 0, role="assistant"),
        event("reasoning.start", 0, 0),
        event("delta.reasoning", 0, 0, text="Hm, é"),
        usage(5, 0, marker=4, final=False),
        event("delta.role", 1, role="assistant"),
        event("reasoning.end", 0, 0, bytes=6, tokens=2, status="complete"),
        event("text.start", 0, 1),
        event("delta.text", 0, 1, text="One 😀"),
        event("text.start", 1, 0),
        event("delta.text", 1, 0, text="Cut", logprobs=[{"token": "Cut"}], token_ids=[7]),
        event("text.end", 0, 1, bytes=8, status="complete"),
        event("tool_call.start", 0, 2, call_id="a", index=0, name="find"),
        event("tool_call.arguments_chunk", 0, 2, call_id="a", text='{"city": '),
        event("tool_call.start", 0, 3, call_id="b", index=1, name="now"),
        event("tool_call.arguments_chunk", 0, 2, call_id="a", text='"Paris"}'),
        event("tool_call.ready", 0, 2, call_id="a", name="find", arguments={"city": "Paris"}),
        event("tool_call.end", 0, 2, call_id="a", arguments='{"city": "Paris"}', valid=True, status="complete"),
        event("tool_call.ready", 0, 3, call_id="b", name="now", arguments={}),
        event("tool_call.end", 0, 3, call_id="b", arguments="", valid=True, status="complete"),
        event("warning", code="missing_done", detail="the engine closed without its end mark"),
        finish(0, "tool_calls", stop="</s>"),
        event("text.end", 1, 0, bytes=3, status="incomplete"),
        finish(1, "length"),
        usage(54, 34, marker=20, final=True),
        end("incomplete", ["tool_calls", "length"], events=26),
    )


def failed_log() -> Log:
    """The engine died within a call and the text above it."""
    cut = {"arguments": "{", "valid": False, "problem": "the stream ended before the call did"}
    return numbered(
        start(choices=1),
        event("delta.role", 0, role="assistant"),
        event("tool_call.start", 0, 0, call_id="a", index=0, name="find"),
        event("tool_call.arguments_chunk", 0, 0, call_id="a", text="{"),
        event("text.start", 0, 1),
        event("delta.text", 0, 1, text="Hm"),
        event("error", code="engine_gone", message="gone", retryable=True, origin="upstream"),
        event("tool_call.end", 0, 0, call_id="a", **cut, status="incomplete"),
        event("text.end", 0, 1, bytes=2, status="incomplete"),
        finish(0, "error"),
        usage(3, 3, final=True),
        end("failed", ["error"], events=12),
    )


def silent_log() -> Log:
    """Cancelled before a word was said: no role, no block."""
    return numbered(
        start(choices=1), finish(0, "cancelled"), usage(0, 0, final=True), end("cancelled", ["cancelled"], 4)
    )


def late_cancel_log() -> Log:
    """Cancelled after the only choice had finished."""
    return numbered(
        start(choices=1),
        event("delta.role", 0, role="assistant"),
        finish(0, "stop"),
        usage(0, 0, final=True),
        end("cancelled", ["stop"], events=5),
    )


GOOD_LOGS = {"rich": rich_log, "failed": failed_log, "silent": silent_log, "late_cancel": late_cancel_log}


@pytest.fixture(params=GOOD_LOGS)
def good_log(request: pytest.FixtureRequest) -> Log:
    return GOOD_LOGS[request.param]()


def test_good_logs_keep_every_promise(good_log: Log) -> None:
    assert verify(good_log) == []


def test_a_log_is_judged_while_it_runs() -> None:
    verifier = Verifier()
    log = rich_log()
    log[10]["text"] = "Cuts"
    found = {event["seq"]: problems for event in log if (problems := verifier.feed(event))}
    assert list(found) == [23, 25], "the block's own end tells first, then the total"
    assert verifier.end() == []


def test_unknown_types_and_fields_are_passed_over() -> None:
    log = rich_log()
    log[7:7] = [event("pause", 0, 1, action="later"), event("mood", "any", kind="source")]
    log[1]["mood"] = {"new": True}
    assert verify(renumber(log)) == []


def test_a_reason_that_this_version_does_not_know_is_refused() -> None:
    log = silent_log()
    log[1]["reason"] = "bored"
    assert verify(log)[0] == (
        "schema: seq 2 (finish): reason is 'bored', not one of "
        "stop, length, tool_calls, content_filter, cancelled, error, other"
    )


# --- Broken logs ----------------------------------------------------------------------------------


def renumber(log: Log) -> Log:
    """Makes the numbers fit again, so that only the fault itself is left to find."""
    for number, one in enumerate(log, 1):
        one |= {"stream_id": "st_1", "seq": number, "ts": 1000 + number}
        if one.get("type") == "stream.end":
            one["events"] = number
    return log


def find(log: Log, name: str, nth: int = 0) -> int:
    return [place for place, one in enumerate(log) if one["type"] == name][nth]


def change(name: str, nth: int = 0, /, **fields: Any) -> Mutation:
    return lambda log: log[find(log, name, nth)].update(copy.deepcopy(fields))


def drop(name: str, nth: int = 0) -> Mutation:
    return lambda log: log.__delitem__(find(log, name, nth))


def drop_field(name: str, field: str, nth: int = 0) -> Mutation:
    return lambda log: log[find(log, name, nth)].__delitem__(field)


def repeat(name: str, nth: int = 0) -> Mutation:
    return lambda log: log.insert(find(log, name, nth), dict(log[find(log, name, nth)]))


def move(name: str, before: str, nth: int = 0, before_nth: int = 0) -> Mutation:
    def mutate(log: Log) -> None:
        one = log.pop(find(log, name, nth))
        log.insert(find(log, before, before_nth), one)

    return mutate


def insert(before: str, one: Event, nth: int = 0) -> Mutation:
    return lambda log: log.insert(find(log, before, nth), dict(one))


def sizes(**fields: int) -> Mutation:
    return lambda log: log[find(log, "usage", -1)]["bytes"].update(fields)


DELTA = event("delta.text", 0, 1, text="x")
WARNING = event("warning", code="late", detail="late")
TICK = usage(54, 34, marker=20, final=False)

# What is done to which log, the guarantee that it breaks, words of the first complaint. Numbers are made to fit again.
FAULTS: dict[str, tuple[Callable[[], Log], Mutation, str, str]] = {
    "no-start": (rich_log, drop("stream.start"), "G2", "(delta.role) opens the log"),
    "two-starts": (rich_log, repeat("stream.start"), "G2", "is a second stream.start"),
    "late-start": (rich_log, move("stream.start", "reasoning.start"), "G2", "opens the log"),
    "no-end": (rich_log, drop("stream.end"), "G2", "stops after seq 25 without stream.end"),
    "early-end": (failed_log, move("stream.end", "finish"), "G5", "comes before the finish of choice 0"),
    "after-end": (rich_log, lambda log: log.append(dict(WARNING)), "G2", "comes after stream.end at seq 26"),
    "unknown-after-end": (rich_log, lambda log: log.append(event("news")), "G2", "after stream.end at seq 26"),
    "newer-schema": (
        rich_log,
        change("stream.start", schema="2.0"),
        "schema",
        "2.0; this verifier knows 1.x",
    ),
    "no-choices": (rich_log, change("stream.start", choices=0), "schema", "has no choices"),
    "no-role": (rich_log, drop("delta.role"), "G3", "(reasoning.start) comes before the role of choice 0"),
    "two-roles": (rich_log, repeat("delta.role", 1), "G3", "is a second role of choice 1"),
    "late-role": (rich_log, move("delta.role", "delta.reasoning"), "G3", "before the role of choice 0"),
    "block-skipped": (rich_log, change("text.start", block=2), "G3", "opens block 2 of choice 0, not 1"),
    "block-reused": (rich_log, change("text.start", block=0), "G3", "opens block 0 of choice 0, not 1"),
    "block-not-opened": (rich_log, drop("text.start"), "G3", "is for block 1, which is not open"),
    "block-not-closed": (rich_log, drop("text.end", -1), "G5", "comes before the end of block 0 of choice 1"),
    "block-never-closed": (failed_log, lambda log: log.__delitem__(slice(8, 10)), "usage", "before the finish"),
    "block-closed-twice": (rich_log, repeat("text.end"), "G3", "is for block 1, which is not open"),
    "delta-after-close": (rich_log, insert("tool_call.start", DELTA), "G3", "is for block 1, which is not open"),
    "delta-of-other-kind": (rich_log, change("delta.text", type="delta.reasoning"), "G3", "which is a text block"),
    "end-of-other-kind": (
        rich_log,
        change("text.end", -1, type="reasoning.end", tokens=1),
        "G3",
        "which is a text block",
    ),
    "two-texts-open": (rich_log, move("text.start", "reasoning.end"), "G4", "while reasoning block 0 is open"),
    "call-under-text": (rich_log, move("text.end", "tool_call.ready"), "G4", "while text block 1 is open"),
    "whole-call-left-open": (
        rich_log,
        move("tool_call.arguments_chunk", "tool_call.start", nth=1, before_nth=1),
        "G4",
        "while tool call block 2 is open and whole",
    ),
    "no-finish": (rich_log, drop("finish", -1), "usage", "is final before the finish of choice 1"),
    "two-finishes": (rich_log, repeat("finish"), "G5", "comes after the finish of choice 0"),
    "early-finish": (rich_log, move("finish", "tool_call.end", before_nth=1), "G5", "before the end of block 3"),
    "choice-not-announced": (rich_log, change("stream.start", choices=1), "G5", "is of choice 1; the stream has 1"),
    "choice-missing": (rich_log, change("stream.start", choices=3), "usage", "before the finish of choice 2"),
    "other-reasons": (rich_log, change("stream.end", finish_reasons=["stop", "length"]), "G5", "the choices said"),
    "reasons-swapped": (rich_log, change("stream.end", finish_reasons=["length", "tool_calls"]), "G5", "said"),
    "empty-delta": (rich_log, insert("text.end", event("delta.text", 0, 1, text="")), "G6", "is an empty delta"),
    "empty-chunk": (rich_log, change("tool_call.arguments_chunk", 1, text=""), "G6", "is an empty delta"),
    "half-a-character": (rich_log, change("delta.text", text="One \ud83d"), "G6", "holds half a character"),
    "block-bytes": (rich_log, change("text.end", bytes=6), "G6", "says 6 bytes; the deltas have 8"),
    "unaccounted": (rich_log, sizes(marker=19), "G6", "54 bytes generated and added, but 53 accounted for"),
    "delivered": (rich_log, sizes(delivered=33, marker=21), "G6", "33 bytes delivered; the deltas have 34"),
    "empty-call-id": (rich_log, change("tool_call.start", call_id=""), "tool_call", "has an empty call_id"),
    "call-id-twice": (rich_log, change("tool_call.start", 1, call_id="a"), "tool_call", "repeats call_id 'a'"),
    "call-index-twice": (rich_log, change("tool_call.start", 1, index=0), "tool_call", "repeats index 0"),
    "chunk-of-other-call": (
        rich_log,
        change("tool_call.arguments_chunk", 1, call_id="b"),
        "tool_call",
        "has call_id 'b' in the block of 'a'",
    ),
    "chunk-after-ready": (
        rich_log,
        insert("tool_call.end", event("tool_call.arguments_chunk", 0, 2, call_id="a", text=" ")),
        "tool_call",
        "comes after ready",
    ),
    "ready-too-early": (
        rich_log,
        move("tool_call.ready", "tool_call.arguments_chunk", before_nth=1),
        "tool_call",
        "has other arguments than the chunks",
    ),
    "ready-twice": (rich_log, repeat("tool_call.ready"), "tool_call", "is a second ready of 'a'"),
    "ready-missing": (rich_log, drop("tool_call.ready"), "tool_call", "is valid without a ready before it"),
    "ready-then-invalid": (
        rich_log,
        change("tool_call.end", valid=False, problem="none"),
        "tool_call",
        "is not valid after its ready",
    ),
    "ready-with-other-name": (rich_log, change("tool_call.ready", name="rm"), "tool_call", "names 'rm'"),
    "ready-with-other-arguments": (
        rich_log,
        change("tool_call.ready", arguments={"city": "Rome"}),
        "tool_call",
        "has other arguments than the chunks",
    ),
    "end-with-other-arguments": (
        rich_log,
        change("tool_call.end", arguments='{"city":"Paris"}'),
        "tool_call",
        "has other arguments than the chunks",
    ),
    "valid-with-problem": (rich_log, change("tool_call.end", problem="none"), "tool_call", "must name a problem"),
    "invalid-without-problem": (failed_log, drop_field("tool_call.end", "problem"), "tool_call", "must name a problem"),
    "valid-but-incomplete": (rich_log, change("tool_call.end", status="incomplete"), "tool_call", "is valid, but"),
    "no-usage": (rich_log, drop("usage", -1), "usage", "comes without a final usage before it"),
    "usage-not-final": (rich_log, change("usage", 1, final=False), "usage", "without a final usage"),
    "two-final-usages": (rich_log, repeat("usage", 1), "usage", "comes after the final usage at seq 25"),
    "usage-before-finish": (rich_log, move("usage", "finish", 1, 1), "usage", "is final before the finish of choice 1"),
    "usage-goes-back": (rich_log, change("usage", completion_tokens=6), "usage", "counts completion_tokens 5 after 6"),
    "bytes-go-back": (rich_log, sizes(marker=3), "usage", "counts bytes.marker 3 after 4"),
    "warning-after-usage": (rich_log, move("warning", "stream.end"), "usage", "comes after the final usage at seq 24"),
    "tick-after-usage": (rich_log, insert("stream.end", TICK), "usage", "comes after the final usage at seq 25"),
    "two-errors": (failed_log, repeat("error"), "error", "is a second error; the first was at seq 7"),
    "text-after-error": (failed_log, insert("text.end", event("delta.text", 0, 1, text="x")), "error", "only ends may"),
    "block-after-error": (failed_log, insert("finish", event("text.start", 0, 2)), "error", "only ends may"),
    "warning-after-error": (failed_log, insert("finish", WARNING), "error", "comes after the error at seq 7"),
    "complete-after-error": (failed_log, change("text.end", status="complete"), "error", "it must end incomplete"),
    "failed-without-error": (failed_log, drop("error"), "status", "is failed, but there was no error"),
    "error-but-completed": (failed_log, change("stream.end", status="completed"), "status", "in spite of the error"),
    "length-but-completed": (rich_log, change("stream.end", status="completed"), "status", "is completed, but"),
    "cancelled-but-completed": (
        silent_log,
        change("stream.end", status="completed"),
        "status",
        "a choice was cancelled",
    ),
    "error-finish-without-error": (late_cancel_log, change("finish", reason="error"), "G5", "the choices said"),
    "field-missing": (rich_log, drop_field("text.end", "bytes"), "schema", "bytes is missing"),
    "field-of-other-type": (rich_log, change("delta.text", text=7), "schema", "text is 7, not string"),
    "true-is-no-number": (rich_log, change("delta.text", block=True), "schema", "block is True, not a whole number"),
    "negative": (rich_log, change("delta.text", block=-1), "schema", "block is -1, not a whole number from 0"),
    "null-where-not-allowed": (rich_log, change("delta.text", text=None), "schema", "text is None, not string"),
    "no-type": (rich_log, drop_field("delta.text", "type"), "schema", "type is missing"),
    "unknown-status": (
        rich_log,
        change("stream.end", status="fine"),
        "schema",
        "status is 'fine', not one of",
    ),
    "usage-without-part": (rich_log, change("usage", bytes={"generated": 1}), "schema", "not an object of the counts"),
}


def count_from_two(log: Log) -> None:
    for one in log:
        one["seq"] += 1


# Faults of the numbers themselves, which are therefore not made to fit.
NUMBER_FAULTS: dict[str, tuple[Mutation, str, str]] = {
    "gap": (lambda log: log.__delitem__(4), "G1", "seq 6 follows seq 4"),
    "twice": (repeat("text.start"), "G1", "seq 8 follows seq 8"),
    "swapped": (move("usage", "delta.reasoning"), "G1", "seq 5 follows seq 3"),
    "starts-late": (count_from_two, "G1", "seq starts at 2"),
    "other-stream": (change("text.end", stream_id="st_2"), "G2", "is of stream 'st_2', the log of 'st_1'"),
    "miscounted": (change("stream.end", events=25), "G2", "counts 25 events; the log has 26"),
    "clock-goes-back": (change("text.end", ts=1000), "ts", "goes back by 11 ms"),
    "seq-is-text": (change("text.end", seq="12"), "schema", "event 12 ('text.end'): seq is '12', not a whole number"),
}


def broken(name: str) -> Log:
    if name in NUMBER_FAULTS:
        log = rich_log()
        NUMBER_FAULTS[name][0](log)
        return log
    make, mutate, _, _ = FAULTS[name]
    log = make()
    mutate(log)
    return renumber(log)


@pytest.mark.parametrize("name", [*FAULTS, *NUMBER_FAULTS])
def test_a_broken_log_is_refused_for_the_right_reason(name: str) -> None:
    *_, guarantee, words = (FAULTS | NUMBER_FAULTS)[name]
    found = verify(broken(name))
    assert found, "refused"
    assert found[0].startswith(f"{guarantee}: "), found
    assert words in found[0]


def test_there_is_a_broken_log_for_every_guarantee() -> None:
    assert {row[-2] for row in (FAULTS | NUMBER_FAULTS).values()} == GUARANTEES


def test_an_empty_log_is_refused() -> None:
    assert verify([]) == ["G2: the log holds no event"]


def test_a_forged_count_of_choices_is_not_walked() -> None:
    log = silent_log()
    log[0]["choices"] = 10**15
    assert [problem for problem in verify(log) if "choice 1" in problem]


def test_arguments_may_be_nested_deeply() -> None:
    """Deeper than recursion reaches: 1000 arrays in one another."""
    text = '{"a":' + "[" * 1000 + "]" * 1000 + "}"
    log = rich_log()
    log[18:20] = [
        event("tool_call.arguments_chunk", 0, 3, call_id="b", text=text),
        event("tool_call.ready", 0, 3, call_id="b", name="now", arguments=orjson.loads(text)),
        event("tool_call.end", 0, 3, call_id="b", arguments=text, valid=True, status="complete"),
    ]
    log[-2]["bytes"] |= {"generated": 54 + len(text), "delivered": 34 + len(text)}
    assert verify(renumber(log)) == []
    log[19]["arguments"] = {"a": orjson.loads("[" * 999 + "]" * 999)}
    assert verify(log) == ["tool_call: seq 20 (tool_call.ready) has other arguments than the chunks"]


@pytest.mark.parametrize(
    ("one", "other"), [("1", "true"), ("1", "1.0"), ("[1]", "[1, 2]"), ("null", "false"), ('{"y": 1}', '{"z": 1}')]
)
def test_arguments_are_compared_as_json_does(one: str, other: str) -> None:
    log = rich_log()
    chunk = f'"x": {one}}}'
    log[13]["text"], log[15]["text"] = "{", chunk
    log[16]["arguments"] = {"x": json.loads(other)}
    log[17]["arguments"] = "{" + chunk
    assert "tool_call: seq 17 (tool_call.ready) has other arguments than the chunks" in verify(log)
    log[16]["arguments"] = {"x": json.loads(one)}
    assert not [problem for problem in verify(log) if problem.startswith("tool_call")]


# --- Every single fault of a kind -----------------------------------------------------------------


@st.composite
def shuffled(draw: st.DrawFn) -> Log:
    """A good log with one event deleted, repeated, or swapped with another one."""
    log = GOOD_LOGS[draw(st.sampled_from(sorted(GOOD_LOGS)))]()
    places = st.integers(0, len(log) - 1)
    one = draw(places)
    match draw(st.sampled_from(["delete", "repeat", "swap"])):
        case "delete":
            del log[one]
        case "repeat":
            log.insert(draw(places), log[one])
        case _:
            other = draw(places.filter(lambda place: place != one))
            log[one], log[other] = log[other], log[one]
    return log


@given(log=shuffled())
def test_no_event_can_be_deleted_repeated_or_swapped(log: Log) -> None:
    assert verify(log)


def test_a_deletion_is_found_even_where_the_numbers_were_made_to_fit(good_log: Log) -> None:
    """All but usage ticks and warnings, which a stream may have or not."""
    for place, one in enumerate(good_log):
        rest = renumber(copy.deepcopy(good_log[:place] + good_log[place + 1 :]))
        # The role of a choice that says nothing may be missing too: its stream may have failed before it.
        may_miss = one["type"] == "warning" or one.get("final") is False or is_role_of_silence(good_log, one)
        assert bool(verify(rest)) is not may_miss, one


def is_role_of_silence(log: Log, one: Event) -> bool:
    blocks = [other for other in log if "block" in other and other["choice"] == one.get("choice")]
    return one["type"] == "delta.role" and not blocks


def test_a_repetition_is_found_even_where_the_numbers_were_made_to_fit(good_log: Log) -> None:
    for place, one in enumerate(good_log):
        longer = renumber(copy.deepcopy([*good_log[:place], dict(one), *good_log[place:]]))
        may_repeat = one["type"] == "warning" or one.get("final") is False
        assert bool(verify(longer)) is not may_repeat, one


def test_neighbours_of_one_block_cannot_be_swapped_even_where_the_numbers_were_made_to_fit(good_log: Log) -> None:
    for place, (one, other) in enumerate(itertools.pairwise(good_log)):
        if "block" in one and other.get("block") == one["block"] and other["choice"] == one["choice"]:
            swapped = renumber(copy.deepcopy([*good_log[:place], other, one, *good_log[place + 2 :]]))
            assert verify(swapped), (one, other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data(), value=JSON)
def test_whatever_a_field_holds_is_judged_and_raises_nothing(data: st.DataObject, value: Any) -> None:
    log = rich_log()
    one = data.draw(st.sampled_from(log))
    one[data.draw(st.sampled_from(sorted(one)))] = value
    for problem in verify(log):
        assert problem.split(":")[0] in GUARANTEES


# --- Reading a log --------------------------------------------------------------------------------


def as_ndjson(log: Log) -> bytes:
    return b"".join(orjson.dumps(one) + b"\n" for one in log)


def as_sse(log: Log) -> bytes:
    frames = (
        sse.encode(one["type"].encode(), f"{one['stream_id']}:{one['seq']}".encode(), orjson.dumps(one)) for one in log
    )
    return b": ok\n\n" + b": heartbeat\n\n".join(frames)


def test_both_spellings_give_the_same_events() -> None:
    log = rich_log()
    assert parse_log(as_ndjson(log)) == log
    assert parse_log(as_sse(log)) == log


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_blank_lines_and_a_byte_order_mark_are_passed_over(ending: bytes) -> None:
    log = silent_log()
    ndjson = b"\xef\xbb\xbf" + ending + as_ndjson(log).replace(b"\n", ending + ending)
    assert parse_log(ndjson) == log
    assert parse_log(b"\xef\xbb\xbf" + as_sse(log).replace(b"\n", ending)) == log


def test_a_last_line_needs_no_line_feed() -> None:
    assert parse_log(as_ndjson(silent_log()).rstrip()) == silent_log()


def test_nothing_is_an_empty_log() -> None:
    assert parse_log(b"") == []
    assert parse_log(b"\n\n") == []


FRAME = b'event: warning\nid: st_1:1\ndata: {"type":"warning","stream_id":"st_1","seq":1}\n\n'


@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        (b'{"type":"a"}\n\n{"type":\n', 3, "not valid JSON"),
        (b'{"type":"a"}\n[1]\n', 2, "an event is a JSON object; found [1]"),
        (b"[1]\n", 1, "an event is a JSON object"),
        (b'{"type":"\xff"}\n', 1, "not valid JSON"),
        (b": ok\n\ndata: [DONE]\n\n", 3, "not valid JSON"),
        (FRAME + FRAME.replace(b"event: warning", b"event: error"), 7, "event: is error, but the type is warning"),
        (FRAME + FRAME.replace(b"event: warning\n", b""), 6, "event: is message, but the type is warning"),
        (FRAME + FRAME.replace(b"id: st_1:1", b"id: st_1:2"), 7, "id: is st_1:2, but stream_id and seq are st_1:1"),
        (FRAME.replace(b"id: st_1:1\n", b""), 2, "id: is missing, but stream_id and seq are st_1:1"),
        (FRAME + FRAME.rstrip(), 7, "the last event is not ended by a blank line"),
        (b": ok\n\nhello\n\n", 3, "neither NDJSON nor server-sent events"),
    ],
)
def test_what_is_no_log_is_refused_with_its_line(data: bytes, line: int, words: str) -> None:
    with pytest.raises(LogError, match=f"^line {line}: ") as caught:
        parse_log(data)
    assert words in str(caught.value)
    assert caught.value.line == line


# --- Broken logs as files -------------------------------------------------------------------------

# Checked in, for `penstock verify` and for verifiers in other languages; the name opens with what is broken.
FILES = {
    "g1-gap": "gap",
    "g2-no-end": "no-end",
    "g2-other-stream": "other-stream",
    "g3-no-role": "no-role",
    "g3-block-not-opened": "block-not-opened",
    "g4-two-texts-open": "two-texts-open",
    "g5-early-finish": "early-finish",
    "g6-block-bytes": "block-bytes",
    "g6-unaccounted": "unaccounted",
    "schema-unknown-status": "unknown-status",
    "ts-clock-goes-back": "clock-goes-back",
    "tool_call-ready-missing": "ready-missing",
    "usage-two-final": "two-final-usages",
    "error-text-after-error": "text-after-error",
    "status-length-but-completed": "length-but-completed",
}


def test_the_broken_files_are_those_of_this_table() -> None:
    files = {path.stem: path.read_bytes() for path in BROKEN_LOGS.glob("*.ndjson")}
    assert files == {"good": as_ndjson(rich_log())} | {name: as_ndjson(broken(fault)) for name, fault in FILES.items()}


BROKEN_FILES = sorted(BROKEN_LOGS.glob("*-*.ndjson"))


@pytest.mark.parametrize("path", BROKEN_FILES, ids=lambda path: path.stem)
def test_a_broken_file_is_refused_for_what_its_name_says(path: Path) -> None:
    guarantee = path.stem.partition("-")[0]
    found = verify(parse_log(path.read_bytes()))
    assert found[0].lower().startswith(f"{guarantee}: ")


def test_the_files_cover_every_guarantee() -> None:
    assert {path.stem.partition("-")[0] for path in BROKEN_FILES} == {name.lower() for name in GUARANTEES}
