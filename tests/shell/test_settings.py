"""Settings from flags, variables and a file; a wrong one is a sentence with key, value, source and remedy."""

import re
from pathlib import Path
from typing import Any

import pytest

from penstock.core.families import choose_family
from penstock.settings import Settings, SettingsError, load_settings

ENGINE = {"upstreams": [{"url": "http://vllm:8000"}]}
HASH = "sha256:" + "0" * 64


def load(
    file: Path | None = None, *, text: str | None = None, environment: dict[str, str] | None = None, **flags: Any
) -> Settings:
    """Settings with an upstream; `text` is written to `file`."""
    if file is not None and text is not None:
        file.write_text(text)
    given = {name.replace("__", "."): value for name, value in flags.items()}
    return load_settings(file, environment or {}, ENGINE | given)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "penstock.yaml"


# --- Where they come from ---------------------------------------------------------------------------


def test_only_the_upstream_is_required() -> None:
    settings = load()
    assert (settings.listen.host, settings.listen.port) == ("127.0.0.1", 8080)
    assert settings.reasoning == "separate"
    assert settings.upstreams[0].label == "vllm:8000"


def test_flags_win_over_variables_and_those_over_the_file(file: Path) -> None:
    file.write_text("{listen: {port: 1, host: localhost}, reasoning: hide, limits: {stream_seconds: 5}}")
    variables = {"PENSTOCK_LISTEN__PORT": "2", "PENSTOCK_REASONING": "inline"}
    settings = load_settings(file, variables, {**ENGINE, "listen.port": 3})
    assert settings.listen.port == 3
    assert settings.reasoning == "inline"
    assert settings.listen.host == "localhost"
    assert settings.limits.stream_seconds == 5


def test_mappings_merge_and_lists_replace_each_other(file: Path) -> None:
    file.write_text("{upstreams: [{url: 'http://file:1', name: file}], limits: {line_bytes: 2000}}")
    settings = load_settings(file, {"PENSTOCK_LIMITS__STREAM_BYTES": "3000"}, {"upstreams": [{"url": "http://flag:2"}]})
    assert settings.upstreams[0].label == "flag:2"
    assert (settings.limits.line_bytes, settings.limits.stream_bytes) == (2000, 3000)


def test_a_variable_is_read_as_yaml() -> None:
    variables = {
        "PENSTOCK_UPSTREAMS": '[{url: "http://one:8000/v1/", parses_tools: false}]',
        "PENSTOCK_AUTH__KEYS": f"{{alice: '{HASH}'}}",
        "PENSTOCK_TIMING__FIRST_BYTE_SECONDS": "0.5",
    }
    settings = load_settings(None, variables)
    assert settings.upstreams[0].url == "http://one:8000"
    assert settings.upstreams[0].parses_tools is False
    assert settings.auth.keys == {"alice": HASH}
    assert settings.timing.first_byte_seconds == 0.5


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_LISTEN__PORT", "4321")
    assert load_settings(flags=ENGINE).listen.port == 4321


def test_variables_that_kubernetes_adds_are_left_alone() -> None:
    kubernetes = {
        "PENSTOCK_PORT": "tcp://10.0.0.1:8080",
        "PENSTOCK_SERVICE_HOST": "10.0.0.1",
        "PENSTOCK_PORT_8080_TCP": "x",
        "OTHER": "1",
    }
    assert load(environment=kubernetes) == load()


def test_an_empty_file_is_no_settings(file: Path) -> None:
    assert load(file, text="") == load()


def test_a_url_may_end_as_openai_clients_spell_it() -> None:
    assert load(upstreams=[{"url": "http://vllm:8000/v1"}]).upstreams[0].url == "http://vllm:8000"


# --- What is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("listen: {port: eighty}", r"listen\.port: 'eighty' \(from .*\.yaml\) is wrong: .*integer.*It is TCP port"),
        ("listen: {port: 70000}", r"listen\.port: 70000 .* less than or equal to 65535"),
        ("listen: {ports: 1}", r"listen\.ports \(from .*\.yaml\): is no setting\. The settings here are: host, port"),
        ("liste: {}", r"liste \(from .*\): is no setting\. The settings here are: listen, upstreams, reasoning"),
        ("reasoning: loud", r"reasoning: 'loud' .* is wrong: .*'separate', 'hide' or 'inline'"),
        (
            "limits: {stream_bytes: -1}",
            r"limits\.stream_bytes: -1 .* greater than or equal to 1024.*\(default 16777216\)",
        ),
        ("limits: {stream_seconds: 0}", r"limits\.stream_seconds: 0 .* greater than 0.*seconds after which a stream"),
        ("timing: {drain_seconds: soon}", r"timing\.drain_seconds: 'soon' .*It is time that open streams get"),
        ("auth: {keys: {alice: plain}}", r"auth\.keys\.alice.*never the key itself; `penstock hash-key` makes one"),
        ("auth: 7", r"auth: 7 .* is wrong: .*It is who may use this"),
        ("families: {mine: {}}", r"families\.mine\.models: is missing\. It is shell patterns of model names"),
        (
            "families: {mine: {models: ['*'], start: a, states: {b: {channel: answer}}}}",
            r"families\.mine.*start must name one of the states: b",
        ),
        (
            "families: {mine: {models: ['*'], start: a, states: {a: {channel: answer, markers: {'<x>': nowhere}}}}}",
            r"families\.mine: .*leads to states that it does not have: \['nowhere'\]",
        ),
        (
            "families: {mine: {models: [m], start: a, states: {a: {channel: answer}}, tools: {open: '<', close: '>'}}}",
            r"families\.mine.*give either states or reasoning and tools, not both",
        ),
        (
            "families: {mine: {models: ['*'], start: a, states: {a: {channel: answer, headers: [['(', a]]}}}}",
            r"families\.mine: ",
        ),
        (
            "families: {mine: {models: ['*'], reasoning: {open: '', close: '>'}}}",
            r"families\.mine\.reasoning\.open: ''",
        ),
        ("[1, 2]", r"penstock\.yaml: must hold a mapping of settings, like `listen: \{port: 8080\}`"),
        ("{unclosed", r"penstock\.yaml: is not YAML"),
    ],
)
def test_a_wrong_file(file: Path, text: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(file, text=text)
    assert re.search(sentence, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize(
    ("upstreams", "sentence"),
    [
        ([], r"upstreams: \[\] .* at least 1 item"),
        ([{}], r"upstreams\.0\.url: is missing\. It is base URL of a vLLM server, e\.g\. http://vllm:8000"),
        ([{"url": "vllm:8000"}], r"upstreams\.0\.url: 'vllm:8000' .* must be a URL like http://vllm:8000"),
        ([{"url": "ftp://vllm"}], r"upstreams\.0\.url: 'ftp://vllm' .* must be a URL like"),
        ([{"url": "http://"}], r"must be a URL like"),
        ([{"url": "http://vllm:8000/?a=b"}], r"must not have a query or a fragment"),
        ([{"url": "http://vllm", "wait": 2}], r"upstreams\.0\.wait .*: is no setting\. .* url, name, api_key"),
        (
            [{"url": "http://vllm", "weight": 0}],
            r"upstreams\.0\.weight: 0 .*greater than 0.* its share of the requests",
        ),
        (
            [{"url": "http://a"}, {"url": "http://a/v1"}],
            r"upstreams: http://a stands there twice; name each engine once",
        ),
        ([{"url": "http://a"}, {"url": "http://b", "parses_tools": False}], r"parses_tools must be the same for all"),
        ([{"url": "http://vllm", "plugin": "maybe"}], r"upstreams\.0\.plugin: 'maybe' .*'auto' or 'off'"),
        ("http://vllm", r"upstreams: 'http://vllm' .* valid list"),
    ],
)
def test_a_wrong_upstream(upstreams: Any, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(upstreams=upstreams)
    assert re.search(sentence, str(caught.value)), str(caught.value)


def test_no_upstream_at_all() -> None:
    with pytest.raises(SettingsError, match=r"upstreams: is missing\. It is the vLLM servers"):
        load_settings(environment={})


def test_a_variable_is_named_as_the_source() -> None:
    with pytest.raises(SettingsError, match=r"listen\.port: 'x' \(from PENSTOCK_LISTEN__PORT\) is wrong"):
        load(environment={"PENSTOCK_LISTEN__PORT": "x"})
    with pytest.raises(SettingsError, match=r"PENSTOCK_LISTEN__PORT: '\{' cannot be read"):
        load(environment={"PENSTOCK_LISTEN__PORT": "{"})
    with pytest.raises(SettingsError, match=r"listen\.nonsense \(from PENSTOCK_LISTEN__NONSENSE\): is no setting"):
        load(environment={"PENSTOCK_LISTEN__NONSENSE": "1"})


def test_a_flag_is_named_as_the_source() -> None:
    with pytest.raises(SettingsError, match=r"listen\.port: -1 \(from --port\) is wrong"):
        load(listen__port=-1)


def test_a_missing_file() -> None:
    with pytest.raises(SettingsError, match=r"nothing\.yaml: cannot be read \(No such file or directory\); give an"):
        load(Path("nothing.yaml"))


def test_a_file_that_is_no_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"penstock\.yaml: is not YAML"):
        load(file)


def test_every_fault_has_its_line() -> None:
    with pytest.raises(SettingsError) as caught:
        load(listen__port=-1, reasoning="loud", limits__nothing=1)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0].split()[0] for line in lines] == ["listen.port", "reasoning", "limits.nothing"]


def test_a_long_value_is_shown_short() -> None:
    with pytest.raises(SettingsError) as caught:
        load(reasoning="x" * 1000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "wrong",
    [{"auth__keys": {"alice": "a-secret-key"}}, {"upstreams": [{"url": "http://vllm", "api_key": ["a-secret-key"]}]}],
)
def test_a_secret_is_never_shown(wrong: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        load(**wrong)
    assert "a-secret-key" not in str(caught.value)


def test_the_engines_key_is_not_printed_with_the_settings() -> None:
    settings = load(upstreams=[{"url": "http://vllm", "api_key": "a-secret-key"}])
    assert "a-secret-key" not in settings.model_dump_json() + repr(settings)


# --- Never an open relay ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "penstock.example"])
def test_beyond_loopback_there_must_be_keys(host: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(listen__host=host)
    for words in (host, "auth.keys_file", "auth.allow_anonymous", "127.0.0.1"):
        assert words in str(caught.value)
    assert load(listen__host=host, auth__keys={"alice": HASH}).listen.host == host
    assert load(listen__host=host, auth__keys_file="keys.txt").listen.host == host
    assert load(listen__host=host, auth__allow_anonymous=True).listen.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert load(listen__host=host).is_loopback


@pytest.mark.parametrize("host", ["127.evil.example", "127.0.0.1.example", "localhost.example", ""])
def test_a_name_that_looks_like_loopback_is_none(host: str) -> None:
    with pytest.raises(SettingsError):
        load(listen__host=host)


# --- Families ---------------------------------------------------------------------------------------


def test_a_family_of_the_settings_comes_before_the_built_in_ones() -> None:
    marks = {"open": "[[", "close": "]]"}
    settings = load(families={"mine": {"models": ["Special-*"], "reasoning": marks, "tools": marks}})
    families = settings.all_families()
    chosen = choose_family(families, "special-7b")
    assert chosen is not None
    assert chosen.name == "mine"
    other = choose_family(families, "qwen3-8b")
    assert other is not None
    assert other.name == "qwen3"


def test_a_built_in_family_may_get_more_models() -> None:
    settings = load(families={"harmony": {"models": ["our-oss"]}})
    chosen = choose_family(settings.all_families(), "our-oss")
    assert chosen is not None
    assert (chosen.name, chosen.start) == ("harmony", "between")
