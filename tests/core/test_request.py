"""What is read from a request, what the engine is asked instead, and what is refused."""

import json
from typing import Any

import pytest

from penstock.core.errors import CallerError
from penstock.core.request import StreamRequest, read_request

TOOLS = [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g"}}]


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [], **fields}).encode()


def read(*, streams: bool | None = None, engine_parses_tools: bool = True, **fields: Any) -> StreamRequest:
    return read_request(body(**fields), streams=streams, engine_parses_tools=engine_parses_tools)


def asked(request: StreamRequest) -> Any:
    """What the engine is asked, without what every request here has."""
    return {name: value for name, value in json.loads(request.engine_body).items() if name not in ("model", "messages")}


def refused(data: bytes) -> CallerError:
    with pytest.raises(CallerError) as raised:
        read_request(data)
    assert raised.value.status == 400
    assert raised.value.origin == "client"
    return raised.value


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code", "param", "message"),
    [
        (b"{", "invalid_json", None, "is not JSON: "),
        (b"", "invalid_json", None, "is not JSON: "),
        (b"\xff", "invalid_json", None, "is not JSON: "),
        (b"[]", "invalid_json", None, "must be a JSON object with model and messages"),
        (b'{"messages": []}', "invalid_request", "model", "must be a string naming the model"),
        (b'{"model": 5, "messages": []}', "invalid_request", "model", "must be a string naming the model"),
        (b'{"model": "m"}', "invalid_request", "messages", "must be a list of chat messages"),
        (b'{"model": "m", "messages": "Hi"}', "invalid_request", "messages", "must be a list of chat messages"),
    ],
)
def test_a_body_that_is_no_request(data: bytes, code: str, param: str | None, message: str) -> None:
    problem = refused(data)
    assert (problem.code, problem.param) == (code, param)
    assert message in problem.message


@pytest.mark.parametrize(
    ("options", "key", "remedy"),
    [
        ([], "penstock", "must be an object"),
        (None, "penstock", "must be an object"),
        (
            {"stops": ["x"]},
            "penstock.stops",
            "the options are annotations, audit, cache, continue, family, include_stop, on_disconnect",
        ),
        ({"reasoning": "shown"}, "penstock.reasoning", "is 'shown'; it must be one of separate, hide, inline"),
        ({"reasoning": []}, "penstock.reasoning", "it must be one of separate, hide, inline"),
        ({"family": 5}, "penstock.family", "must be the name of a model family"),
        ({"include_stop": "yes"}, "penstock.include_stop", "must be true or false"),
        ({"cache": "yes"}, "penstock.cache", "must be true or false"),
        ({"stop": "END"}, "penstock.stop", "must be a list of 1 to 16 strings that are not empty"),
        ({"stop": []}, "penstock.stop", "must be a list of 1 to 16 strings that are not empty"),
        ({"stop": [""]}, "penstock.stop", "must be a list of 1 to 16 strings that are not empty"),
        ({"stop": [5]}, "penstock.stop", "must be a list of 1 to 16 strings that are not empty"),
        ({"stop": ["x"] * 17}, "penstock.stop", "must be a list of 1 to 16 strings that are not empty"),
    ],
)
def test_an_option_that_is_wrong_is_refused_by_name_and_with_the_remedy(options: Any, key: str, remedy: str) -> None:
    problem = refused(body(penstock=options))
    assert (problem.code, problem.param) == ("invalid_request", key)
    assert problem.message.startswith(key)
    assert remedy in problem.message


def test_a_body_that_can_be_read_but_not_written_is_refused() -> None:
    deep = b'{"model": "m", "messages": [], "stream": true, "x": ' + b"[" * 500 + b"]" * 500 + b"}"
    problem = refused(deep)
    assert problem.code == "invalid_json"
    assert "nested too deeply" in problem.message


# --- What the engine is asked ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b' {"messages" : [],\n "model":"m", "temperature": 1.0, "x": 1e2, "n": 2}\n',
        b'{"model": "m", "messages": [], "stream": false}',
        b'{"model": "m", "messages": [], "stream": false, "stream_options": {"include_usage": true}}',
        b'{"model": "m", "messages": [], "x": "\\u00e9", "model": "m"}',
        b'{"model": "m", "messages": [], "x": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
)
def test_a_body_that_needs_no_change_is_passed_byte_for_byte(data: bytes) -> None:
    request = read_request(data)
    assert request.engine_body == data
    assert request.streams is False


def test_options_of_penstock_are_not_for_the_engine() -> None:
    assert asked(read(penstock={"stop": ["END"]}, x=1)) == {"x": 1}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"include_usage": True, "continuous_usage_stats": True}),
        ({"stream_options": None}, {"include_usage": True, "continuous_usage_stats": True}),
        ({"stream_options": {}}, {"include_usage": True, "continuous_usage_stats": True}),
        ({"stream_options": {"include_usage": False}}, {"include_usage": True, "continuous_usage_stats": True}),
        (
            {"stream_options": {"include_obfuscation": False, "continuous_usage_stats": False}},
            {"include_obfuscation": False, "include_usage": True, "continuous_usage_stats": True},
        ),
    ],
)
def test_a_stream_is_asked_for_its_count(given: Any, wanted: Any) -> None:
    request = read(stream=True, **given)
    assert request.streams is True
    assert asked(request) == {"stream": True, "stream_options": wanted}


def test_the_running_count_is_not_asked_for_where_the_deployment_does_not_want_it() -> None:
    request = read_request(body(stream=True), running_usage=False)
    assert asked(request)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("wrong", ["usage", 5, [1]])
def test_stream_options_of_another_shape_are_left_to_the_engine_to_refuse(wrong: Any) -> None:
    assert asked(read(stream=True, stream_options=wrong)) == {"stream": True, "stream_options": wrong}


def test_the_route_may_stream_whatever_the_body_says() -> None:
    request = read(streams=True, stream=False)
    assert request.streams is True
    assert asked(request)["stream"] is True


@pytest.mark.parametrize(
    ("given", "wanted"), [({}, "none"), ({"tool_choice": None}, "none"), ({"tool_choice": "auto"}, "none")]
)
def test_an_engine_without_a_tool_parser_is_not_asked_to_choose(given: Any, wanted: str) -> None:
    request = read(engine_parses_tools=False, tools=TOOLS, **given)
    assert asked(request)["tool_choice"] == wanted
    assert request.offered_tools == {"f", "g"}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": []},
        {},
    ],
)
def test_any_other_choice_of_tools_is_passed(fields: Any) -> None:
    request = read(engine_parses_tools=False, **fields)
    assert request.engine_body == body(**fields)


def test_an_engine_with_a_tool_parser_chooses_itself() -> None:
    assert read(tools=TOOLS, tool_choice="auto").engine_body == body(tools=TOOLS, tool_choice="auto")


# --- What is read ---------------------------------------------------------------------------------


def test_a_bare_request() -> None:
    assert read() == StreamRequest(
        model="m",
        choices=1,
        streams=False,
        engine_body=body(),
        tools={},
        thinking=True,
        reasoning=None,
        family=None,
        stop=(),
        include_stop=False,
        engine_stops=frozenset(),
        wants_usage=False,
        wants_running_usage=False,
        max_tokens=None,
        temperature=None,
        top_p=None,
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        wants_token_ids=False,
        shows_stop_token=False,
        on_disconnect=None,
        continues=None,
        text_bytes=0,
        cache=None,
        audit_timeline=False,
        audit_masks=False,
        begun_text="",
        last_user_text="",
        wants_json=False,
        tool_release=None,
        runs_tools=True,
        structured=None,
        citations=True,
        needs_engine_text=None,
    )


def test_the_bytes_of_text_in_the_messages() -> None:
    """Words count, pictures do not: a guess at the prompt's tokens must not count their base64."""
    parts = [{"type": "text", "text": "né"}, {"type": "image_url", "image_url": {"url": "data:,AAAA"}}, 7]
    odd = [{"role": "user"}, "text", None, {"content": 7}, {"content": [{"text": 7}]}]
    assert read(messages=[{"role": "user", "content": parts}, {"content": "日本"}, *odd]).text_bytes == 3 + 6


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"penstock": {"reasoning": "hide"}}, "reasoning", "hide"),
        ({"penstock": {"family": "harmony"}}, "family", "harmony"),
        ({"penstock": {"stop": ["a", "b"]}}, "stop", ("a", "b")),
        ({"penstock": {"include_stop": True}}, "include_stop", True),
        ({"penstock": {"cache": False}}, "cache", False),
        ({"stream_options": {"include_usage": True}}, "wants_usage", True),
        ({"stream_options": {"include_usage": 1}}, "wants_usage", False),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, "wants_running_usage", True),
        ({"stream_options": {"continuous_usage_stats": True}}, "wants_running_usage", False),
        ({"stop": "a"}, "engine_stops", frozenset({"a"})),
        ({"stop": ["a", 3], "stop_token_ids": [7, "b", True]}, "engine_stops", frozenset({"a", 7})),
        ({"stop": 3, "stop_token_ids": 7}, "engine_stops", frozenset()),
        ({"max_tokens": 5}, "max_tokens", 5),
        ({"max_tokens": 5, "max_completion_tokens": 7}, "max_tokens", 7),
        ({"max_tokens": "5"}, "max_tokens", None),
        ({"max_tokens": True}, "max_tokens", None),
        ({"temperature": 0}, "temperature", 0.0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"skip_special_tokens": False}, "skip_special_tokens", False),
        ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens", False),
        ({"return_token_ids": True}, "wants_token_ids", True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "thinking", False),
        ({"chat_template_kwargs": {"thinking": False}}, "thinking", False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "thinking", True),
        ({"chat_template_kwargs": []}, "thinking", True),
    ],
)
def test_a_field_is_read(fields: Any, name: str, value: Any) -> None:
    assert getattr(read(**fields), name) == value


@pytest.mark.parametrize(
    ("n", "choices"),
    [
        (3, 3), (2.0, 2), ("2", 2), (16384, 16384), (True, 1), (None, 1), (0, 1), (-1, 1), (16385, 1), ("x", 1),
        ([2], 1), (1e300, 1), ("9" * 5000, 1),
    ],
)  # fmt: skip
def test_how_many_choices_vllm_makes_of_n(n: Any, choices: int) -> None:
    assert read(n=n).choices == choices


@pytest.mark.parametrize(
    ("tools", "names"),
    [
        (TOOLS, {"f", "g"}),
        ({"f": 1}, set()),
        ([5, {}, {"function": 5}, {"function": {}}, {"function": {"name": 5}}, *TOOLS[:1]], {"f"}),
    ],
)
def test_which_tools_are_offered(tools: Any, names: set[str]) -> None:
    assert read(tools=tools).offered_tools == names
    assert read(tools=tools, tool_choice="none").offered_tools == set()


# --- What only vLLM's own text can answer ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ["END"]),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("prompt_logprobs", 1),
        ("echo", True),
        ("use_beam_search", True),
        ("bad_words", ["x"]),
        ("kv_transfer_params", {"a": 1}),
        ("return_tokens_as_token_ids", True),
        ("continue_final_message", True),
        ("parallel_tool_calls", False),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_a_field_that_token_ids_cannot_serve_is_named(name: str, value: Any) -> None:
    assert read(**{name: value}).needs_engine_text == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", []),
        ("stop", None),
        ("logprobs", False),
        ("parallel_tool_calls", True),
        ("parallel_tool_calls", None),
        ("tool_choice", "auto"),
        ("tool_choice", "none"),
        ("penstock", {"stop": ["END"]}),
        ("temperature", 0),
    ],
)
def test_a_field_that_token_ids_can_serve(name: str, value: Any) -> None:
    assert read(**{name: value}).needs_engine_text is None


def test_a_choice_that_was_rewritten_for_the_engine_needs_no_text_of_it() -> None:
    assert read(engine_parses_tools=False, tools=TOOLS, tool_choice="auto").needs_engine_text is None
