"""The recording format, the choice of a recording, and the plans that a fault makes of it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.recording import (
    FAULTS,
    FOREVER,
    RESET_GRACE_SECONDS,
    Action,
    Chunk,
    EndAnswer,
    Ending,
    Fault,
    FaultKind,
    Recording,
    RecordingError,
    ReplayError,
    SendBytes,
    SendHeaders,
    UnknownRecordingError,
    check_speed,
    describe_faults,
    error_body,
    parse_fault,
    parse_recording,
    pick_recording,
    plan_replay,
)

ROLE = 'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
SMILE = 'data: {"choices":[{"index":0,"delta":{"content":"😀"}}]}\n\n'
TOOL = 'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c1"}]}}]}\n\n'
FINISH = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = "data: [DONE]\n\n"


def header(**changes: object) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "recording": 1,
        "name": "smile",
        "engine": "vllm 0.32.0 (cpu)",
        "about": "One emoji.",
        "request": {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hi"}]},
        "status": 200,
        "content_type": "text/event-stream; charset=utf-8",
    }
    return {key: value for key, value in {**fields, **changes}.items() if value is not None}


def jsonl(*lines: object) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def recorded(*reads: tuple[float, str], **changes: object) -> Recording:
    chunks = [{"ms": ms, "text": text} for ms, text in reads]
    return parse_recording(jsonl(header(**changes), *chunks), "smile.jsonl")


def stream() -> Recording:
    """Five events in three reads: the second read holds two and a half of them."""
    return recorded((10, ROLE), (20, SMILE + TOOL + FINISH[:20]), (40, FINISH[20:] + DONE))


def document() -> Recording:
    return recorded((30, '{"choices":[]}'), content_type="application/json", name="whole")


def body_of(actions: Sequence[Action]) -> bytes:
    return b"".join(action.data for action in actions if isinstance(action, SendBytes))


def ending_of(actions: Sequence[Action]) -> EndAnswer:
    assert isinstance(actions[-1], EndAnswer)
    return actions[-1]


def headers_of(actions: Sequence[Action]) -> SendHeaders:
    assert isinstance(actions[0], SendHeaders)
    return actions[0]


def planned(fault: str, recording: Recording | None = None, speed: float = 1.0) -> list[Action]:
    return plan_replay(recording or stream(), parse_fault(fault), speed)


# --- The format -------------------------------------------------------------------------------------


def test_a_recording_is_read_with_its_request_and_its_chunks() -> None:
    half = "😀".encode()[:2]
    content = jsonl(header(), {"ms": 1.5, "text": "data: é"}, {"ms": 2, "base64": base64.b64encode(half).decode()})

    recording = parse_recording(content + b"\n", "smile.jsonl")

    assert recording.name == "smile"
    assert recording.model == "tiny"
    assert recording.is_event_stream
    assert recording.status == 200
    assert recording.chunks == (Chunk(1.5, "data: é".encode()), Chunk(2.0, half))
    assert recording.body == "data: é".encode() + half


def test_a_request_that_names_no_model_has_an_empty_one() -> None:
    assert recorded((0, "x"), request={}).model == ""


CHUNK = {"ms": 1, "text": "x"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "r.jsonl: the file is empty"),
        (b"{nonsense\n", "r.jsonl, line 1: not valid JSON"),
        (b"[]\n", r"r.jsonl, line 1: must be a JSON object; found \[\]"),
        (jsonl(CHUNK), 'line 1: a header has "recording": 1, .* found nothing'),
        (jsonl(header(recording=2)), "line 1: a header .* found 2"),
        (jsonl(header(name=None)), "line 1: name must be a string; found nothing"),
        (jsonl(header(name="")), "line 1: name must not be empty"),
        (jsonl(header(request=[1])), r"line 1: request must be an object; found \[1\]"),
        (jsonl(header(status=True)), "line 1: status must be a number; found true"),
        (jsonl(header(status=99)), "line 1: status is 99; it must be an HTTP status"),
        (jsonl(header(content_type=7)), "line 1: content_type must be a string; found 7"),
        (jsonl(header(about={"long": "x" * 99})), r"line 1: about must be a string; found .{57}\.\.\."),
        (jsonl(header()), "r.jsonl: no chunk follows the header"),
        (jsonl(header(), CHUNK, "x"), "line 3: must be a JSON object"),
        (jsonl(header(), {"text": "x"}), "line 2: ms must be a number of milliseconds.* found nothing"),
        (jsonl(header(), {"ms": -1, "text": "x"}), "line 2: ms must be .* found -1"),
        (jsonl(header(), {"ms": 5, "text": "x"}, CHUNK), "line 3: ms goes back from 5 to 1"),
        (jsonl(header(), {"ms": 1}), 'line 2: a chunk has either "text" or "base64"'),
        (jsonl(header(), {**CHUNK, "base64": ""}), 'line 2: a chunk has either "text" or "base64"'),
        (jsonl(header(), {"ms": 1, "text": 5}), "line 2: text must be a string; found 5"),
        (jsonl(header(), {"ms": 1, "text": ""}), "line 2: text must not be empty"),
        (jsonl(header(), {"ms": 1, "base64": "?"}), "line 2: base64 cannot be decoded"),
    ],
)
def test_a_broken_recording_is_refused_with_file_line_and_problem(content: bytes, complaint: str) -> None:
    with pytest.raises(RecordingError, match=complaint):
        parse_recording(content, "r.jsonl")


# --- The choice -------------------------------------------------------------------------------------


def asks(text: object, **more: object) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": text}], **more}


PLAIN = recorded((0, "x"), name="plain", request=asks("hi"))
STREAMED = recorded((0, "x"), name="streamed", request=asks("hi", stream=True))
TWO = recorded((0, "x"), name="two", request=asks("hi", stream=True, n=2))
OTHER = recorded((0, "x"), name="other", request=asks("bye", stream=True))
SHELF = [PLAIN, STREAMED, TWO, OTHER]


@pytest.mark.parametrize(
    ("request_body", "name", "chosen"),
    [
        (asks("hi"), "other", OTHER),
        (asks("hi"), None, PLAIN),
        (asks("hi", stream=True), None, STREAMED),
        (asks("hi", stream=True, n=1), None, STREAMED),
        (asks("hi", stream=True, n=2), None, TWO),
        (asks("bye", stream=True), None, OTHER),
        (asks("never heard", stream=True), None, STREAMED),
        (asks("never heard"), None, PLAIN),
        ({"messages": "nonsense"}, None, PLAIN),
        ({"messages": ["nonsense"], "stream": True}, None, STREAMED),
        ({}, None, PLAIN),
    ],
)
def test_the_recording_is_found_by_name_then_by_request_then_by_stream(
    request_body: dict[str, Any], name: str | None, chosen: Recording
) -> None:
    assert pick_recording(SHELF, request_body, name).name == chosen.name


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownRecordingError, match=r'called "nope".*known: plain, streamed, two, other') as told:
        pick_recording(SHELF, asks("hi"), "nope")
    assert told.value.status == 404


def test_a_request_whose_stream_flag_no_recording_has_is_refused() -> None:
    with pytest.raises(UnknownRecordingError, match=r"No recording has stream=true.*known: plain"):
        pick_recording([PLAIN], asks("hi", stream=True))


# --- Faults as text ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("stall", Fault(FaultKind.STALL, after=3, seconds=FOREVER)),
        ("stall:after=5:seconds=30", Fault(FaultKind.STALL, after=5, seconds=30)),
        ("stall:seconds=forever", Fault(FaultKind.STALL, seconds=FOREVER)),
        ("reset:after=0", Fault(FaultKind.RESET, after=0)),
        ("refuse:status=429", Fault(FaultKind.REFUSE, status=429)),
        ("slow_first:seconds=0.25", Fault(FaultKind.SLOW_FIRST, seconds=0.25)),
        ("bytes:size=7", Fault(FaultKind.BYTES, size=7)),
    ],
)
def test_a_fault_is_read_from_its_text(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("explode", 'Unknown fault "explode"; known: stall:after=:seconds=, drop:after=, .*bytes:size='),
        ("", 'Unknown fault ""'),
        (5, "A fault is a string such as .*; found 5"),
        ("drop:seconds=1", 'drop has no parameter "seconds"; it takes after'),
        ("no_done:after=1", 'no_done has no parameter "after"; it takes none'),
        ("drop:after", 'drop has after=""; it must be a number of events'),
        ("drop:after=-1", 'after="-1"; it must be a number of events, 0 or more'),
        ("drop:after=1:after=2", "drop has after twice"),
        ("stall:seconds=soon", 'seconds="soon"; it must be a number of seconds, 0 or more, or forever'),
        ("stall:seconds=nan", 'seconds="nan"; it must be'),
        ("stall:seconds=-1", 'seconds="-1"; it must be'),
        ("refuse:status=200", 'status="200"; it must be an HTTP error status'),
        ("refuse:status=999", 'status="999"; it must be an HTTP error status'),
        ("bytes:size=0", 'size="0"; it must be a number of bytes, 1 or more'),
    ],
)
def test_a_wrong_fault_is_refused_with_what_is_known(text: object, complaint: str) -> None:
    with pytest.raises(ReplayError, match=complaint) as told:
        parse_fault(text)
    assert told.value.status == 400


def test_every_kind_has_a_row_and_is_described() -> None:
    assert set(FAULTS) == set(FaultKind)
    assert [entry.partition(":")[0] for entry in describe_faults().split(", ")] == list(FAULTS)


@pytest.mark.parametrize("speed", [-1, math.inf, math.nan, True, "2", None])
def test_an_impossible_speed_is_refused(speed: object) -> None:
    with pytest.raises(ReplayError, match=r"speed is .*; it must be 0"):
        check_speed(speed)


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (500, "InternalServerError"),
        (503, "ServiceUnavailableError"),
        (404, "NotFoundError"),
        (400, "BadRequestError"),
    ],
)
def test_errors_have_the_names_that_vllm_gives_them(status: int, name: str) -> None:
    assert json.loads(error_body(status, "no")) == {
        "error": {"message": "no", "type": name, "param": None, "code": status}
    }


# --- Plans ------------------------------------------------------------------------------------------


def test_without_a_fault_a_stream_is_sent_read_by_read_in_recorded_time() -> None:
    recording = stream()
    first, second, third = (chunk.data for chunk in recording.chunks)

    assert plan_replay(recording) == [
        SendHeaders(0.0, 200, "text/event-stream; charset=utf-8", None),
        SendBytes(0.010, first),
        SendBytes(0.020, second),
        SendBytes(0.040, third),
        EndAnswer(0.040, Ending.COMPLETE),
    ]


def test_a_document_has_its_length_and_its_headers_come_with_it() -> None:
    length = len('{"choices":[]}')

    assert plan_replay(document()) == [
        SendHeaders(0.030, 200, "application/json", length),
        SendBytes(0.030, b'{"choices":[]}'),
        EndAnswer(0.030, Ending.COMPLETE),
    ]


@pytest.mark.parametrize(("speed", "last"), [(1, 0.040), (2, 0.020), (0.5, 0.080), (0, 0.0)])
def test_speed_divides_recorded_time(speed: float, last: float) -> None:
    assert ending_of(plan_replay(stream(), speed=speed)).at == pytest.approx(last)


def test_a_stall_delays_what_is_behind_it_by_real_seconds() -> None:
    actions = planned("stall:after=2:seconds=30", speed=0)

    sends = [action for action in actions if isinstance(action, SendBytes)]
    assert [send.at for send in sends] == [0, 0, 30, 30, 30]
    assert body_of(actions) == stream().body
    assert ending_of(actions) == EndAnswer(30, Ending.COMPLETE)


def test_a_stall_without_seconds_never_ends() -> None:
    actions = planned("stall:after=2")

    assert [action.at for action in actions[3:]] == [FOREVER] * 4
    assert actions[2].at < FOREVER


def test_a_stall_behind_the_last_event_holds_back_the_ending_alone() -> None:
    actions = planned("stall:after=5:seconds=1", speed=0)

    assert ending_of(actions).at == 1
    assert actions[-2].at == 0


def test_a_drop_ends_the_body_properly_and_early_when_the_next_event_was_due() -> None:
    actions = planned("drop:after=3")

    assert body_of(actions) == (ROLE + SMILE + TOOL).encode()
    assert ending_of(actions) == EndAnswer(0.040, Ending.CLOSE)


def test_a_dropped_document_has_no_length_that_would_give_it_away() -> None:
    actions = planned("drop:after=0", document())

    assert headers_of(actions).content_length is None
    assert body_of(actions) == b""
    assert ending_of(actions) == EndAnswer(0.030, Ending.CLOSE)


def test_a_reset_leaves_time_to_read_what_came_before() -> None:
    actions = planned("reset:after=1", speed=0)

    assert body_of(actions) == ROLE.encode()
    assert ending_of(actions) == EndAnswer(RESET_GRACE_SECONDS, Ending.RESET)


def test_a_cut_ends_in_the_middle_of_a_character() -> None:
    actions = planned("cut:after=1")

    before, emoji = (ROLE + SMILE).encode().split("😀".encode())[0], "😀".encode()
    assert body_of(actions) == before + emoji[:2]
    assert ending_of(actions).ending is Ending.CLOSE


def test_a_cut_with_no_such_character_behind_it_is_refused() -> None:
    with pytest.raises(ReplayError, match="smile has no character of several bytes behind event 2"):
        planned("cut:after=2")


def test_an_error_frame_is_followed_by_done() -> None:
    actions = planned("error:after=1")

    role, frame, done = body_of(actions).decode().split("\n\n")[:-1]
    assert role + "\n\n" == ROLE
    assert json.loads(frame.removeprefix("data: "))["error"]["type"] == "InternalServerError"
    assert done == "data: [DONE]"
    assert ending_of(actions).ending is Ending.COMPLETE


def test_no_done_leaves_out_the_last_frame_only() -> None:
    assert body_of(planned("no_done")) == (ROLE + SMILE + TOOL + FINISH).encode()


def test_double_tools_sends_each_tool_call_chunk_twice_and_nothing_else() -> None:
    assert body_of(planned("double_tools")) == (ROLE + SMILE + TOOL + TOOL + FINISH + DONE).encode()


def test_double_tools_passes_over_frames_that_are_no_chunks() -> None:
    odd = ': ok\n\ndata: 5\n\ndata: {"choices":[7]}\n\ndata: {"error":{}}\n\n'

    assert body_of(planned("double_tools", recorded((0, odd)))) == odd.encode()


def test_a_refusal_takes_the_place_of_the_answer() -> None:
    actions = planned("refuse:status=429")

    headers = headers_of(actions)
    assert (headers.at, headers.status, headers.content_type) == (0, 429, "application/json")
    assert headers.content_length == len(body_of(actions))
    assert json.loads(body_of(actions))["error"]["code"] == 429


def test_slow_headers_delay_everything() -> None:
    actions = planned("slow_headers:seconds=2")

    assert [action.at for action in actions] == pytest.approx([2.0, 2.010, 2.020, 2.040, 2.040])


def test_slow_first_sends_headers_at_once_and_the_first_bytes_after_so_many_seconds() -> None:
    actions = planned("slow_first:seconds=2")

    assert [action.at for action in actions] == pytest.approx([0.0, 2.0, 2.010, 2.030, 2.030])


def test_slow_first_is_never_faster_than_the_recording() -> None:
    assert planned("slow_first:seconds=0") == plan_replay(stream())


def test_bytes_sends_pieces_of_the_size_asked_for() -> None:
    actions = planned("bytes:size=7", speed=0)

    sizes = [len(action.data) for action in actions if isinstance(action, SendBytes)]
    assert set(sizes[:-1]) == {7}
    assert 0 < sizes[-1] <= 7
    assert body_of(actions) == stream().body


@pytest.mark.parametrize("fault", ["stall", "drop", "reset", "error"])
def test_a_fault_behind_the_last_event_is_refused(fault: str) -> None:
    with pytest.raises(ReplayError, match=f"smile has 5 events, so {fault} after=6 never happens"):
        planned(f"{fault}:after=6")


@pytest.mark.parametrize("fault", ["error:after=0", "no_done", "double_tools"])
def test_faults_of_streams_are_refused_for_a_document(fault: str) -> None:
    with pytest.raises(ReplayError, match="is for streams, and the recording whole is application/json"):
        planned(fault, document())


def test_the_last_event_may_lack_its_blank_line() -> None:
    actions = planned("drop:after=2", recorded((0, ROLE + "data: [DONE]")))

    assert body_of(actions) == (ROLE + "data: [DONE]").encode()


def test_events_may_end_in_crlf() -> None:
    actions = planned("drop:after=1", recorded((0, "data: a\r\n\r\ndata: b\r\n\r\n")))

    assert body_of(actions) == b"data: a\r\n\r\n"


# --- Properties -------------------------------------------------------------------------------------

reads = st.lists(
    st.tuples(st.floats(0, 1000), st.sampled_from([ROLE, SMILE, TOOL, DONE, "data", ": é\n\n", "\n"])),
    min_size=1,
).map(lambda pairs: [(ms, text) for ms, (_, text) in zip(sorted(p[0] for p in pairs), pairs, strict=True)])
sizes = st.integers(1, 600)


@given(reads, sizes)
def test_whatever_the_size_of_the_pieces_the_bytes_are_the_recorded_ones(
    parts: list[tuple[float, str]], size: int
) -> None:
    recording = recorded(*parts)

    assert body_of(plan_replay(recording, Fault(FaultKind.BYTES, size=size))) == recording.body


@given(reads, sizes, st.floats(0, 8))
def test_no_piece_comes_before_its_bytes_were_recorded(parts: list[tuple[float, str]], size: int, speed: float) -> None:
    recording = recorded(*parts)
    due = [
        action.at
        for action in plan_replay(recording, speed=speed)
        if isinstance(action, SendBytes)
        for _ in action.data
    ]
    sent = 0
    for action in plan_replay(recording, Fault(FaultKind.BYTES, size=size), speed):
        if isinstance(action, SendBytes):
            sent += len(action.data)
            assert action.at == due[sent - 1]


@given(reads, st.sampled_from(list(FaultKind)), st.integers(0, 9), st.floats(0, 100), sizes, st.floats(0, 8))
def test_every_plan_has_headers_first_one_ending_last_and_time_that_never_goes_back(
    parts: list[tuple[float, str]], kind: FaultKind, after: int, seconds: float, size: int, speed: float
) -> None:
    try:
        actions = plan_replay(recorded(*parts), Fault(kind, after=after, seconds=seconds, size=size), speed)
    except ReplayError:
        return  # this fault cannot happen in this recording, and it was said so

    times = [action.at for action in actions]
    assert times == sorted(times)
    assert [type(action) for action in actions[:1]] == [SendHeaders]
    assert all(isinstance(action, SendBytes) for action in actions[1:-1])
    assert isinstance(actions[-1], EndAnswer)
