"""The plugin's records through the whole journey: the same events as vLLM's own chunks, and more exact counts."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.commands import AbortEngine, Ending, Respond
from penstock.core.detokenize import Vocabulary
from penstock.core.events import EngineDone, EngineUsage, Extra, Failed, Text
from penstock.core.exchange import Exchange
from penstock.core.families import choose_family
from penstock.core.frames import Begin, End, EngineFailed, Finish, Lost, Record, Tag, Tokens
from penstock.core.request import read_request
from penstock.core.setting import Setting
from penstock.core.signals import EngineTagged, Signal
from penstock.core.tagged_stream import TaggedReader
from support import chunks
from support.chunks import Json
from support.golden import Case, all_cases, client_request
from support.playbook import (
    ALL_FAMILIES,
    EPOCH_MS,
    GENEROUS,
    STARTED,
    STREAM_ID,
    DialectName,
    Outcome,
    ask,
    check,
    parse_events,
    play,
    spelling,
    tell,
)
from support.record import EMOJI, EXCHANGES, PARIS, THINKING, THINKING_TOOL, TOKYO
from support.strategies import MARKERS, cuts, families, model_texts, policies, thorough
from support.tokenizers_made import MadeTokenizer, made

STREAM = 7
PROMPT_TOKENS, CACHED_TOKENS = 9, 4
QWEN = made("qwen")
EOS = QWEN.added["<|im_end|>"]


# --- What a plugin says -------------------------------------------------------------------------------


def begin(prompt_end: tuple[int, ...] = (), state: str = "") -> Begin:
    return Begin(STREAM, PROMPT_TOKENS, CACHED_TOKENS, prompt_end, state)


def tokens(
    ids: Iterable[int], choice: int = 0, *, tokenizer: MadeTokenizer = QWEN, end: int | None = None
) -> list[Record]:
    """What the plugin says of the tokens of one step: a run for each channel. `end` is an id that ended the choice."""
    marks = {number for text, number in tokenizer.added.items() if text in MARKERS} | {end}
    runs = groupby(ids, key=lambda number: number in marks)
    return [Tokens(STREAM, choice, Tag.MARKER if marker else Tag.ANSWER, tuple(run)) for marker, run in runs]


def message(*records: Record) -> list[Record]:
    """What one engine step brought, as one message."""
    return list(records)


def ended(choice: int = 0, cause: str = "eos", reason: str = "stop", stop: int | str | None = None) -> Finish:
    return Finish(STREAM, choice, cause, reason, stop)


def answer_by_eos(
    steps: Iterable[Sequence[int]], tokenizer: MadeTokenizer = QWEN, eos: int = EOS
) -> list[list[Record]]:
    """Messages of a whole stream of one choice."""
    spoken = [tokens(step, tokenizer=tokenizer) for step in steps]
    return [[begin()], *spoken, [*tokens([eos], tokenizer=tokenizer, end=eos), ended(), End(STREAM)]]


def each(ids: Iterable[int]) -> list[list[int]]:
    """One id a step."""
    return [[number] for number in ids]


# --- What becomes of it -------------------------------------------------------------------------------


def play_tagged(
    body: Json | None,
    messages: Iterable[list[Record] | Signal],
    *,
    tokenizer: MadeTokenizer = QWEN,
    dialect: DialectName = "ndjson",
    family: str | None = None,
    reasoning: Any = None,
) -> Outcome:
    """`playbook.play` for a stream that comes as records, a list of them for each message."""
    request = read_request(json.dumps(body or ask()).encode(), streams=True)
    chosen = choose_family(ALL_FAMILIES, request.model, family or request.family)
    assert chosen is not None
    reader = TaggedReader(request, Vocabulary(tokenizer.json), chunks.ENGINE_ID, chunks.MODEL)
    policy = reasoning or request.reasoning or "separate"
    setting = Setting(STREAM_ID, "vllm", None, chosen, policy, GENEROUS, STARTED, EPOCH_MS, reader)
    outcome = Outcome(Exchange(request, setting, spelling(dialect, request)))
    outcome.commands += outcome.exchange.start()
    for message in messages:
        signal = EngineTagged(message, STARTED) if isinstance(message, list) else message
        outcome.commands += tell(outcome.exchange, signal)
    if dialect in ("ndjson", "sse"):
        outcome.events = parse_events(outcome.data)
    check(outcome, client_left=False)
    return outcome


def said(events: Iterable[Json], *ignored: str) -> list[Json]:
    """Events without the clock, without fields of the engine, and without those `ignored`."""
    dropped = {"ts", "ext", "duration_ms", "ttft_ms", *ignored}
    return [{name: value for name, value in event.items() if name not in dropped} for event in events]


# Counts that vLLM's chunks tell only with running usage, and then only by chunk.
BY_CHANNEL = ("tokens", "reasoning_tokens", "answer_tokens", "tool_tokens", "delivered_tokens")
COUNTS = (*BY_CHANNEL, "prompt_tokens", "cached_tokens", "completion_tokens")


# --- The recordings of a real vLLM ------------------------------------------------------------------


def is_comparable(case: Case) -> bool:
    """Raw text of the model, streamed, that the tagged path would serve."""
    request = client_request(case)
    return request.model == "tiny" and request.streams and request.needs_engine_text is None


COMPARABLE = {case.name: case for case in all_cases() if is_comparable(case)}


def test_there_are_recordings_to_compare() -> None:
    assert {"emoji", "broken-bytes", "choices", "tools", "repetition", "error-midway"} <= COMPARABLE.keys()


@pytest.mark.parametrize("name", COMPARABLE)
def test_a_recording_gives_the_log_of_vllm_s_own_chunks(name: str) -> None:
    case = COMPARABLE[name]
    body = {**case.recording.request, "penstock": dict(case.options)}
    if "tools" in body:
        del body["tool_choice"]
    outcome = play_tagged(body, messages_of(case))
    golden = parse_events(case.path.read_bytes())
    counts = (*COUNTS, "estimated", "token_ids")
    assert said(outcome.events, *counts) == said(golden, *counts)


def messages_of(case: Case) -> Iterator[list[Record]]:
    """What the plugin would have sent for a recording, by another tokenizer with the same added tokens."""
    exchange = EXCHANGES[case.recording.name]
    bytewise = iter(QWEN.bytewise(exchange.said[0]) if exchange.bytewise else ())
    yield [begin()]
    for chunk in chunks_of(case.recording.body):
        if "error" in chunk:
            yield [EngineFailed(STREAM, chunk["error"]["code"], json.dumps(chunk).encode())]
            return
        for choice in chunk["choices"]:
            if "role" not in choice["delta"]:
                yield step_of(choice, bytewise if exchange.bytewise else None)
    yield [End(STREAM)]


def chunks_of(body: bytes) -> Iterator[Json]:
    for line in body.split(b"\n\n"):
        if line not in (b"", b"data: [DONE]"):
            yield json.loads(line.removeprefix(b"data: "))


def step_of(choice: Json, bytewise: Iterator[int] | None) -> list[Record]:
    """One chunk of one choice; where every byte was a token there was a chunk for each of them."""
    index, text, reason = choice["index"], choice["delta"].get("content") or "", choice["finish_reason"] or ""
    eos = [EOS] if reason == "stop" else []
    ids = [next(bytewise)] if bytewise and not eos else QWEN.encode(text) + eos
    causes = {"length": "max_tokens", "stop": "eos"}
    ends = [ended(index, causes.get(reason, reason), reason, choice["stop_reason"])] if reason else []
    return [*tokens(ids, index, end=EOS), *ends]


# --- Transcripts: the same deltas as chunks -----------------------------------------------------------


class Transcript:
    """One answer both ways: `messages` of records and `steps` of chunks with a running count."""

    def __init__(self, choices: Sequence[Sequence[Sequence[int]]], tokenizer: MadeTokenizer, *, eos: int) -> None:
        self._tokenizer = tokenizer
        self._eos = eos
        self._ids: list[list[int]] = [[] for _ in choices]
        self._texts = ["" for _ in choices]
        self._counts = [0 for _ in choices]
        self.messages: list[list[Record]] = [[begin()]]
        self.steps = [b"".join(chunks.role(number, tokens=0) for number in range(len(choices)))]
        for turn in range(max(map(len, choices)) + 1):
            self._turn([(number, steps[turn]) for number, steps in enumerate(choices) if turn < len(steps)])
            self._finish([number for number, steps in enumerate(choices) if turn == len(steps)])
        self.messages.append([End(STREAM)])
        self.steps += [chunks.final_usage(sum(self._counts), PROMPT_TOKENS), chunks.DONE]

    def _turn(self, spoken: list[tuple[int, Sequence[int]]]) -> None:
        self.messages.append(
            [record for number, ids in spoken for record in tokens(ids, number, tokenizer=self._tokenizer)]
        )
        self.steps.append(b"".join(self._chunk(number, ids) for number, ids in spoken))

    def _finish(self, numbers: list[int]) -> None:
        for number in numbers:
            last = tokens([self._eos], number, tokenizer=self._tokenizer, end=self._eos)
            self.messages.append([*last, ended(number)])
            self.steps.append(chunks.finish(choice=number, tokens=self._count(number, [self._eos])))

    def _chunk(self, number: int, ids: Sequence[int]) -> bytes:
        before = self._texts[number]
        for token_id in ids:
            self._texts[number] = self._said(number, token_id)
        return chunks.content(self._texts[number].removeprefix(before), number, tokens=self._count(number, ids))

    def _said(self, number: int, token_id: int) -> str:
        """The text once this id came, by the library's plain decoding; vLLM waits until a character is whole."""
        self._ids[number].append(token_id)
        text: str = self._tokenizer.tokenizer.decode(self._ids[number])
        return self._texts[number] if text.endswith("\ufffd") else text

    def _count(self, number: int, ids: Sequence[int]) -> int:
        self._counts[number] += len(ids)
        return self._counts[number]


def both(
    body: Json,
    choices: Sequence[Sequence[Sequence[int]]],
    tokenizer: MadeTokenizer = QWEN,
    *,
    eos: int = EOS,
    **setting: Any,
) -> tuple[Outcome, Outcome]:
    transcript = Transcript(choices, tokenizer, eos=eos)
    tagged = play_tagged(body, transcript.messages, tokenizer=tokenizer, **setting)
    return tagged, play(body, transcript.steps, **setting)


@pytest.mark.parametrize("text", [THINKING, THINKING_TOOL, EMOJI, f"{PARIS}\n{TOKYO}", "<think>", ""])
@pytest.mark.parametrize("bytewise", [False, True])
def test_events_and_counts_are_those_of_chunks_with_running_usage(text: str, bytewise: bool) -> None:
    body = ask(tools=["get_weather", "get_time"])
    ids = QWEN.bytewise(text) if bytewise else QWEN.encode(text)
    tagged, plain = both(body, [each(ids)])
    assert said(tagged.events, "cached_tokens") == said(plain.events, "cached_tokens")
    assert tagged.usage()["cached_tokens"] == CACHED_TOKENS


@pytest.mark.parametrize("text", [THINKING, THINKING_TOOL])
def test_chunks_of_the_openai_dialect_are_the_same_but_for_the_time_they_were_created(text: str) -> None:
    body = ask(tools=["get_weather"], stream_options={"include_usage": True}, stream=True)
    tagged, plain = both(body, [each(QWEN.encode(text))], dialect="chat")

    def comparable(outcome: Outcome) -> list[Any]:
        said = [{**chunk, "created": 0} if isinstance(chunk, dict) else chunk for chunk in outcome.chat_chunks()]
        return [chunk for chunk in said if not isinstance(chunk, dict) or chunk["choices"]]

    assert comparable(tagged) == comparable(plain)


token_lists = st.one_of(
    model_texts.map(QWEN.encode),
    model_texts.map(QWEN.bytewise),
    st.just(QWEN.bytewise(THINKING_TOOL)),
    st.just(QWEN.encode(EMOJI)),
)


@thorough(150)
@given(st.lists(token_lists, min_size=1, max_size=2), families, policies)
def test_any_text_a_token_a_step(ids: list[list[int]], family: Any, policy: Any) -> None:
    setting = {"family": family, "reasoning": policy}
    tagged, plain = both(ask(n=len(ids), tools=["f", "get_weather"]), [each(one) for one in ids], **setting)
    assert said(tagged.events, "cached_tokens") == said(plain.events, "cached_tokens")


@thorough(150)
@given(st.lists(token_lists, min_size=1, max_size=2), st.data(), families, policies)
def test_any_text_in_bursts(ids: list[list[int]], data: st.DataObject, family: Any, policy: Any) -> None:
    choices = [[step for step in cut_ids(one, data.draw(cuts(len(one)))) if step] for one in ids]
    setting = {"family": family, "reasoning": policy}
    tagged, plain = both(ask(n=len(ids), tools=["f", "get_weather"]), choices, **setting)
    assert said(tagged.events, *BY_CHANNEL, "cached_tokens") == said(plain.events, *BY_CHANNEL, "cached_tokens")


def cut_ids(ids: list[int], positions: Sequence[int]) -> list[list[int]]:
    edges = [0, *positions, len(ids)]
    return [ids[start:end] for start, end in pairwise(edges)]


@thorough(100)
@given(model_texts, model_texts, st.data(), families)
def test_how_records_are_grouped_into_messages_does_not_matter(
    first: str, second: str, data: st.DataObject, family: Any
) -> None:
    """But for how neighbouring deltas are merged; the last tokens of a choice and its finish are never parted."""
    transcript = Transcript([each(QWEN.bytewise(text)) for text in (first, second)], QWEN, eos=EOS)
    records = [record for message in transcript.messages for record in message]
    allowed = [n for n in range(1, len(records)) if not isinstance(records[n], Finish)]
    positions = sorted(data.draw(st.sets(st.sampled_from(allowed))))
    body = ask(n=2, tools=["f", "get_weather"])
    alone, grouped = (
        play_tagged(body, messages, family=family)
        for messages in (
            transcript.messages,
            [records[a:b] for a, b in zip([0, *positions], [*positions, None], strict=True)],
        )
    )
    assert grouped.contents() == alone.contents()
    assert grouped.types() == alone.types()
    assert grouped.finishes() == alone.finishes()
    assert grouped.record.usage == alone.record.usage


# --- Markers that a decoder skips ---------------------------------------------------------------------

HARMONY_SAID = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi."


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_harmony_markers_are_found_though_the_decoder_skips_them(size: int) -> None:
    tokenizer = made("tiktoken")
    ids = tokenizer.encode(HARMONY_SAID)
    messages = answer_by_eos(
        [ids[at : at + size] for at in range(0, len(ids), size)], tokenizer, tokenizer.added["<|return|>"]
    )
    outcome = play_tagged(ask(), messages, tokenizer=tokenizer, family="harmony")
    assert outcome.blocks() == ["reasoning: hm", "text: Hi."]
    assert outcome.usage()["bytes"]["marker"] == len(HARMONY_SAID) - len("hmHi.")


def test_a_run_of_markers_with_text_among_them_is_written_out_in_order() -> None:
    """The text of a Harmony header is a marker too, so that one run holds what is skipped and what is not."""
    tokenizer = made("tiktoken")
    ids = tokenizer.encode("<|channel|>analysis<|message|>")
    messages = [
        message(begin(), Tokens(STREAM, 0, Tag.MARKER, tuple(ids))),
        tokens(tokenizer.encode("hm"), tokenizer=tokenizer),
    ]
    outcome = play_tagged(ask(), messages, tokenizer=tokenizer, family="harmony")
    assert outcome.blocks() == ["reasoning: hm"]


@pytest.mark.parametrize(("skip", "thought"), [(True, "hm"), (False, " hm")])
def test_mistral_markers(skip: bool, thought: str) -> None:
    """This shape puts a space before each piece of text and strips the very first, which may be a marker."""
    tokenizer = made("mistral")
    messages = answer_by_eos(each(tokenizer.encode("[THINK]hm[/THINK]Hi.")), tokenizer, tokenizer.added["</s>"])
    outcome = play_tagged(ask(skip_special_tokens=skip), messages, tokenizer=tokenizer, family="mistral")
    assert outcome.blocks() == [f"reasoning: {thought}", "text:  Hi."]


def test_a_marker_of_several_tokens() -> None:
    tokenizer = made("plain_delimiters")
    assert len(tokenizer.encode("<think>")) > 1
    messages = answer_by_eos(each(tokenizer.encode(THINKING)), tokenizer, tokenizer.added["<|endoftext|>"])
    outcome = play_tagged(ask(), messages, tokenizer=tokenizer)
    assert outcome.blocks() == ["reasoning: \nThe user says hi.\n", "text: \n\nHello! How can I help?"]


def test_a_special_token_that_is_no_marker_is_not_written_out() -> None:
    start = QWEN.added["<|im_start|>"]
    records: list[list[Record]] = [[begin(), Tokens(STREAM, 0, Tag.ANSWER, (*QWEN.encode("a"), start, EOS))]]
    outcome = play_tagged(ask(ignore_eos=True), [*records, tokens(QWEN.encode("b"))])
    assert outcome.blocks() == ["text: ab"]


# --- The end of a choice ------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
def test_the_token_that_ended_the_answer_is_no_text(skip: bool) -> None:
    body = ask(skip_special_tokens=skip, return_token_ids=True)
    outcome = play_tagged(body, answer_by_eos(each(QWEN.encode("Hi"))))
    assert outcome.blocks() == ["text: Hi"]
    assert outcome.one("finish")["token_ids"] == [EOS]
    assert outcome.usage()["completion_tokens"] == len(QWEN.encode("Hi")) + 1


def test_a_grammar_ends_with_an_end_token_too() -> None:
    last: list[Record] = [*tokens([EOS], end=EOS), ended(cause="grammar", stop="grammar"), End(STREAM)]
    outcome = play_tagged(ask(), [[begin(), *tokens(QWEN.encode("Hi")), *last]])
    assert outcome.blocks() == ["text: Hi"]
    assert (outcome.finishes()[0]["cause"], outcome.finishes()[0]["stop"]) == ("grammar", "grammar")


def test_a_marker_right_before_the_end_in_one_run() -> None:
    ids = (QWEN.added["<think>"], *QWEN.encode("hm"), QWEN.added["</think>"], EOS)
    outcome = play_tagged(ask(), [[begin(), *tokens(ids, end=EOS), ended(), End(STREAM)]])
    assert outcome.blocks() == ["reasoning: hm"]
    assert outcome.usage()["bytes"]["marker"] == len("<think></think>")


def test_a_stop_token_that_is_not_part_of_the_answer() -> None:
    [stop] = QWEN.encode("!")
    ids = [*QWEN.encode("Hi"), stop]
    last: list[Record] = [*tokens(ids, end=stop), ended(cause="stop_token", stop=stop), End(STREAM)]
    outcome = play_tagged(ask(), [[begin(), *last]])
    assert outcome.blocks() == ["text: Hi"]
    assert outcome.finishes()[0]["cause"] == "stop_token"
    assert outcome.finishes()[0]["stop"] == stop


def test_a_marker_that_stops_and_is_part_of_the_answer() -> None:
    close = QWEN.added["</think>"]
    body = ask(stop_token_ids=[close], include_stop_str_in_output=True)
    last = [*tokens([*QWEN.encode("Hm."), close]), ended(cause="stop_token", stop=close), End(STREAM)]
    outcome = play_tagged(body, [[begin(state="reasoning"), *last]])
    assert outcome.blocks() == ["reasoning: Hm."]
    assert outcome.usage()["bytes"]["marker"] == len("</think>")


def test_a_stop_token_that_is_part_of_the_answer() -> None:
    [stop] = QWEN.encode("!")
    last: list[Record] = [*tokens([*QWEN.encode("Hi"), stop]), ended(cause="stop_token", stop=stop), End(STREAM)]
    assert play_tagged(ask(), [[begin(), *last]]).blocks() == ["text: Hi!"]


@pytest.mark.parametrize(
    ("cause", "raw", "reason"),
    [
        ("eos", "stop", "stop"),
        ("grammar", "stop", "stop"),
        ("stop_string", "stop", "stop"),
        ("max_tokens", "length", "length"),
        ("repetition", "repetition", "other"),
        ("unknown", "stop", "stop"),
        ("unknown", "", "other"),
        ("unknown", "something new", "other"),
    ],
)
def test_causes_and_reasons(cause: str, raw: str, reason: str) -> None:
    outcome = play_tagged(ask(), [[begin(), *tokens(QWEN.encode("Hi")), ended(cause=cause, reason=raw), End(STREAM)]])
    finished = outcome.finishes()[0]
    assert finished["reason"] == reason
    assert finished["cause"] == (None if cause == "unknown" else cause)
    assert finished["raw_reason"] == raw


def test_max_tokens_within_a_character() -> None:
    ids = QWEN.bytewise("Hi 👧")[:-1]
    outcome = play_tagged(
        ask(), [[begin()], *map(tokens, each(ids)), [ended(cause="max_tokens", reason="length"), End(STREAM)]]
    )
    assert outcome.blocks() == ["text: Hi "]
    assert outcome.usage()["completion_tokens"] == len(ids)
    assert outcome.one("stream.end")["status"] == "incomplete"


@pytest.mark.parametrize("held", ["👩\u200d", "🇩🇪🇫"])
def test_no_delta_ends_within_a_visible_character_but_the_last(held: str) -> None:
    ids = QWEN.encode(held)
    spoken = [message(begin()), *map(tokens, each(ids))]
    outcome = play_tagged(ask(), spoken)
    assert outcome.blocks() == [f"text: {held[:-1]}"]
    outcome = play_tagged(ask(), [*spoken, [ended(cause="max_tokens", reason="length"), End(STREAM)]])
    assert outcome.blocks() == [f"text: {held}"]


@pytest.mark.parametrize(
    "last", [[Lost(STREAM, 1)], [EngineFailed(STREAM, 500, b"")], [ended(cause="abort", reason="abort")]]
)
def test_what_waits_for_the_rest_of_a_visible_character_is_not_lost_with_the_stream(last: list[Record]) -> None:
    outcome = play_tagged(ask(), [[begin(), *tokens(QWEN.encode("👩\u200d"))], last])
    assert outcome.blocks() == ["text: 👩\u200d"]


def test_a_reader_that_is_closed_lets_go_of_what_waits() -> None:
    request = read_request(json.dumps(ask()).encode(), streams=True)
    reader = TaggedReader(request, Vocabulary(QWEN.json), "", "")
    reader.read([begin(), *tokens(QWEN.encode("👩\u200d"))])
    [text] = reader.close()
    assert isinstance(text, Text)
    assert text.text == "\u200d"
    assert reader.close() == []
    assert reader.read(tokens(QWEN.encode("more"))) == []


# --- Counts -------------------------------------------------------------------------------------------


def test_tokens_are_counted_by_channel_also_in_bursts() -> None:
    text = f"<think>hm, so</think>Hi there{PARIS}"
    ids = QWEN.encode(text)
    usages = []
    for size in (1, 3, len(ids)):
        steps = [ids[at : at + size] for at in range(0, len(ids), size)]
        outcome = play_tagged(ask(tools=["get_weather"]), answer_by_eos(steps))
        usages.append(
            {name: outcome.usage()[name] for name in COUNTS[1:] if name not in ("tool_tokens", "delivered_tokens")}
        )
    thought, answer = len(QWEN.encode("hm, so")), len(QWEN.encode("Hi there"))
    assert usages[0]["reasoning_tokens"] == thought
    assert usages[0]["answer_tokens"] == answer
    assert usages[0]["completion_tokens"] == len(ids) + 1
    assert (usages[0]["prompt_tokens"], usages[0]["cached_tokens"]) == (PROMPT_TOKENS, CACHED_TOKENS)
    assert usages[0] == usages[1] == usages[2]


def test_the_engine_s_count_is_exact_and_so_is_that_of_an_answer_that_it_gave_up() -> None:
    spoken = [message(begin()), tokens(QWEN.encode("Hi"))]
    complete = play_tagged(ask(), [*spoken, [ended(), End(STREAM)]])
    given_up = play_tagged(ask(), [*spoken, [ended(cause="abort", reason="abort"), End(STREAM)]])
    cut = play_tagged(ask(), [*spoken, [Lost(STREAM, 1)]])
    assert [outcome.usage()["estimated"] for outcome in (complete, given_up, cut)] == [False, False, True]
    assert {outcome.usage()["completion_tokens"] for outcome in (complete, given_up, cut)} == {len(QWEN.encode("Hi"))}


def test_token_ids_travel_with_their_text() -> None:
    ids = QWEN.encode(THINKING)
    outcome = play_tagged(ask(return_token_ids=True), answer_by_eos(each(ids)))
    assert [number for event in outcome.events for number in event.get("token_ids", ())] == [*ids, EOS]


# --- Two choices --------------------------------------------------------------------------------------


def test_two_choices_in_one_stream() -> None:
    records: list[Record] = [*tokens(QWEN.encode("a")), *tokens(QWEN.encode("<think>x"), 1)]
    more: list[Record] = [ended(), *tokens(QWEN.encode("</think>y"), 1), ended(1, "max_tokens", "length"), End(STREAM)]
    outcome = play_tagged(ask(n=2), [[begin()], records, more])
    assert (outcome.blocks(0), outcome.blocks(1)) == (["text: a"], ["reasoning: x", "text: y"])
    assert outcome.types()[:3] == ["stream.start", "delta.role", "delta.role"]
    assert outcome.one("stream.end")["finish_reasons"] == ["stop", "length"]


def test_a_choice_without_any_token_still_finishes() -> None:
    outcome = play_tagged(ask(), [[begin(), ended(cause="max_tokens", reason="length"), End(STREAM)]])
    assert outcome.types() == ["stream.start", "delta.role", "finish", "usage", "stream.end"]


# --- Failures -----------------------------------------------------------------------------------------

OVERLOADED = {"error": {"message": "too busy", "type": "ServiceUnavailable", "param": None, "code": 503}}


def failed(status: int, body: Any) -> list[Record]:
    return [EngineFailed(STREAM, status, body if isinstance(body, bytes) else json.dumps(body).encode())]


@pytest.mark.parametrize("first", [[], [[begin()]]], ids=["at once", "begun"])
@pytest.mark.parametrize("dialect", ["ndjson", "sse", "folded", "chat"])
def test_an_error_before_the_first_token_is_an_http_status(dialect: DialectName, first: list[list[Record]]) -> None:
    outcome = play_tagged(ask(), [*first, failed(503, OVERLOADED)], dialect=dialect)
    assert outcome.only(Respond).status == 503
    if dialect == "chat":
        assert outcome.body == OVERLOADED


def test_an_error_in_the_middle() -> None:
    outcome = play_tagged(ask(), [[begin(), *tokens(QWEN.encode("Hi <thi"))], failed(503, OVERLOADED)])
    told = outcome.one("error")
    assert (told["code"], told["message"], told["retryable"]) == ("engine_error", "too busy", True)
    assert outcome.blocks() == ["text: Hi <thi"]
    assert outcome.record.ending is Ending.ENGINE_ERROR


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b"", "the engine answered 500"),
        (500, b"\xff\x00", "the engine answered 500"),
        (500, [1], "the engine answered 500"),
        (400, {"error": "only words"}, "only words"),
        (400, {"object": "error", "message": "old"}, "old"),
        (500, b'{"error": {"message": "x", "deep": ' + b"[" * 300 + b"]" * 300 + b"}}", "the engine answered 500"),
        (500, {"error": {"message": "\ud800"}}, "\ufffd"),
    ],
)
@pytest.mark.parametrize("dialect", ["ndjson", "chat"])
def test_whatever_the_error_s_body_is(status: int, body: Any, message: str, dialect: DialectName) -> None:
    outcome = play_tagged(ask(), [failed(status, body)], dialect=dialect)
    assert outcome.only(Respond).status == status
    assert message[:20] in outcome.body["error"]["message"] or message == "\ufffd"


@pytest.mark.parametrize(
    ("status", "told", "retryable"),
    [
        (400, 400, False),
        (404, 404, False),
        (408, 408, True),
        (429, 429, True),
        (503, 503, True),
        (0, 502, True),
        (65535, 502, True),
    ],
)
def test_which_errors_may_be_tried_again(status: int, told: int, retryable: bool) -> None:
    outcome = play_tagged(ask(), [failed(status, b"{}")])
    assert outcome.only(Respond).status == told
    assert outcome.body["error"]["retryable"] is retryable


def test_a_stream_that_the_plugin_dropped() -> None:
    outcome = play_tagged(ask(), [[begin(), *tokens(QWEN.encode("Hi"))], [Lost(STREAM, 1)]])
    assert (outcome.one("error")["code"], outcome.one("error")["retryable"]) == ("engine_outbox_full", True)
    assert play_tagged(ask(), [[Lost(STREAM, 1)]]).only(Respond).status == 503


@pytest.mark.parametrize("cause", ["abort", "error"])
def test_an_answer_that_the_engine_gave_up_is_an_error_as_with_chunks(cause: str) -> None:
    spoken = tokens(QWEN.encode("Hi"))
    tagged = play_tagged(ask(), [[begin(), *spoken], [ended(cause=cause, reason=cause), End(STREAM)]])
    steps = [chunks.role(tokens=0), chunks.content("Hi", tokens=len(QWEN.encode("Hi")))]
    plain = play(ask(), [*steps, chunks.finish(cause, tokens=len(QWEN.encode("Hi"))), chunks.DONE])
    assert tagged.one("error")["code"] == f"engine_{cause}"
    assert said(tagged.events, "cached_tokens") == said(plain.events, "cached_tokens")


def test_one_choice_of_two_that_the_engine_gave_up_ends_both() -> None:
    spoken = message(begin(), *tokens(QWEN.encode("a")), *tokens(QWEN.encode("b"), 1))
    outcome = play_tagged(ask(n=2), [spoken, message(ended(1, "error", "error"))])
    assert outcome.one("error")["code"] == "engine_error"
    assert [outcome.finishes()[number]["reason"] for number in (0, 1)] == ["error", "error"]
    assert outcome.usage()["estimated"] is True, "the other choice was not over"


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (tokens([1]), "spoke before it began"),
        ([begin(), begin()], "began twice"),
        ([begin(), *tokens([1], 1)], "spoke for choice 1 of 1"),
        ([begin(), ended(255)], "spoke for choice 255 of 1"),
        ([begin(), ended(), ended()], "went on with choice 0 after its finish"),
        ([begin(), ended(), *tokens([1])], "went on with choice 0 after its finish"),
    ],
)
def test_records_against_the_contract_end_the_stream(records: list[Record], words: str) -> None:
    request = read_request(json.dumps(ask()).encode(), streams=True)
    reader = TaggedReader(request, Vocabulary(QWEN.json), "", "")
    last = reader.read([*records, End(STREAM)])[-1]
    assert isinstance(last, Failed)
    assert last.code == "engine_malformed"
    assert words in last.message
    outcome = play_tagged(ask(), [records])
    assert outcome.count(AbortEngine) == 1


def test_a_request_that_the_engine_gave_up_before_its_first_token_has_no_beginning() -> None:
    outcome = play_tagged(ask(), [[ended(cause="abort", reason="abort"), End(STREAM)]])
    assert outcome.one("error")["code"] == "engine_abort"
    assert play_tagged(ask(), [[ended(), End(STREAM)]]).blocks() == []


# --- What the prompt has opened -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "text", "blocks"),
    [
        ("reasoning", "Hm.</think>Yes", ["reasoning: Hm.", "text: Yes"]),
        ("reasoning", "</think>Yes", ["text: Yes"]),
        ("reasoning", "Hm.", ["reasoning: Hm."]),
        ("opening", "Hm.</think>Yes", ["text: Hm.</think>Yes"]),
        ("no such state", "<think>Hm.</think>Yes", ["reasoning: Hm.", "text: Yes"]),
    ],
)
def test_the_plugin_says_what_the_prompt_has_opened(state: str, text: str, blocks: list[str]) -> None:
    spoken = [tokens([number]) for number in QWEN.encode(text)]
    outcome = play_tagged(ask(), [[begin(state=state)], *spoken, [*tokens([EOS], end=EOS), ended(), End(STREAM)]])
    assert outcome.blocks() == blocks


def test_a_family_that_thinks_at_once_does_not_where_the_template_closed_the_thought() -> None:
    messages: list[list[Record] | Signal] = [[begin(state="opening")], tokens(QWEN.encode("Yes"))]
    messages.append([*tokens([EOS], end=EOS), ended(), End(STREAM)])
    assert play_tagged(ask(), messages, family="deepseek-r1").blocks() == ["text: Yes"]


# --- What stands beside -----------------------------------------------------------------------------------


def test_the_prompt_s_ids_are_told_where_they_are_asked_for_and_known() -> None:
    ids = tuple(range(PROMPT_TOKENS))
    whole = [begin(ids), *tokens(QWEN.encode("a")), *tokens([EOS], end=EOS), ended(), End(STREAM)]
    told = play_tagged(ask(return_token_ids=True), [whole])
    assert told.one("delta.role")["ext"] == {"prompt_token_ids": list(ids)}
    for body, known in ((ask(), ids), (ask(return_token_ids=True), ids[1:])):
        whole[0] = begin(known)
        assert "ext" not in play_tagged(body, [whole]).one("delta.role")


def test_the_engine_s_fingerprint_stands_beside_its_last_count() -> None:
    request = read_request(json.dumps(ask()).encode(), streams=True)
    reader = TaggedReader(request, Vocabulary(QWEN.json), "", "", fingerprint="vllm-0.32.0")
    said = reader.read([begin(), *tokens([EOS], end=EOS), ended(), End(STREAM)])
    assert [type(event) for event in said[-3:]] == [Extra, EngineUsage, EngineDone]
    assert said[-3] == Extra(None, {"system_fingerprint": "vllm-0.32.0"})


def test_an_end_without_a_finish_is_never_success() -> None:
    outcome = play_tagged(ask(n=2), [[begin(), *tokens(QWEN.encode("a")), ended(), End(STREAM)]])
    assert outcome.one("error")["code"] == "engine_incomplete"


def test_nothing_is_read_after_the_end() -> None:
    request = read_request(json.dumps(ask()).encode(), streams=True)
    reader = TaggedReader(request, Vocabulary(QWEN.json), "", "")
    assert isinstance(reader.read([begin(), ended(), End(STREAM), *tokens([1])])[-1], EngineDone)
    assert reader.read([begin(), Lost(STREAM, 1)]) == []


def test_penstock_s_own_stop_string_ends_the_engine() -> None:
    body = ask(penstock={"stop": ["END"]})
    outcome = play_tagged(body, [[begin()], *map(tokens, each(QWEN.bytewise("Hi END and more")))])
    assert outcome.blocks() == ["text: Hi "]
    assert outcome.count(AbortEngine) == 1
    assert outcome.record.ending is Ending.COMPLETED
