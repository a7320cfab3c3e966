"""API keys: who gets in, whose stream is whose, and what a caller without a key is told."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiohttp import web

from penstock.access_settings import Auth, Plan
from penstock.core.errors import CallerError
from penstock.settings import SettingsError
from penstock.shell.auth import ANONYMOUS, Gatekeeper, Keyring, hash_key
from penstock.shell.callers import Caller
from penstock.shell.replay import serving as serving_engine
from support import chunks
from support.commands import serving
from support.http_client import Json, calling, chat
from support.sockets import raw_request, until
from support.upstreams import Seen, Setup, engine_app, in_front_of, opened, saying, silence

ALICE, BOB = "alices-key-0123456789", "bobs-key-0123456789"
WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Basic {ALICE}"},
    {"Authorization": f"Bearer {ALICE} "[:-2]},
    {"Authorization": f"Bearer {hash_key(ALICE)}"},
    {"Authorization": "Bearer \udcff"},
    {"X-Api-Key": "wrong"},
]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.txt"
    file.write_text(f"# people\nalice = {hash_key(ALICE)}\n\nbob={hash_key(BOB)}  # until May\n")
    return file


def write(file: Path, text: str | None) -> None:
    """The file with this text, or without it none."""
    if text is None:
        file.unlink()
    else:
        file.write_text(text)


# --- The keyring ------------------------------------------------------------------------------------


async def test_without_keys_everybody_is_anonymous() -> None:
    gatekeeper = await Gatekeeper.load(Auth())
    assert not gatekeeper.asks_for_keys
    assert (await gatekeeper.authenticate({})).name == ANONYMOUS


async def test_keys_come_from_the_file_and_the_settings(keys: Path) -> None:
    gatekeeper = await Gatekeeper.load(Auth(keys_file=keys, keys={"carol": hash_key("carols-key")}))
    assert gatekeeper.asks_for_keys
    assert (await gatekeeper.authenticate(bearer(ALICE))).name == "alice"
    assert (await gatekeeper.authenticate({"Authorization": f"bearer   {BOB}"})).name == "bob"
    assert (await gatekeeper.authenticate({"X-Api-Key": "carols-key"})).name == "carol"


@pytest.mark.parametrize("headers", WRONG)
async def test_any_other_key_is_refused_with_a_challenge(keys: Path, headers: Mapping[str, str]) -> None:
    with pytest.raises(CallerError) as caught:
        await (await Gatekeeper.load(Auth(keys_file=keys))).authenticate(headers)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers == {"WWW-Authenticate": 'Bearer realm="penstock"'}


def test_a_hash_is_what_the_command_line_makes_of_a_key() -> None:
    # printf key | sha256sum
    assert hash_key("key") == "sha256:2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no key; add a line like name=sha256:<hex>"),
        ("# only a remark\n", "holds no key"),
        (f"alice={ALICE}\n", "line 1: must be sha256:<64 hex digits>, never the key itself"),
        (f"\n\nalice {hash_key(ALICE)}\n", "line 3: must be sha256:<64 hex digits>"),
        ("alice=sha256:ABC\n", "line 1: must be sha256"),
        (f"alice={hash_key(ALICE)} plan=gold\n", "line 1: plan 'gold' is not one of auth.plans (default)"),
        (f"alice={hash_key(ALICE)} plans=gold\n", "line 1: 'plans' is nothing that a key can have; write NAME=VALUE"),
        (f"alice={hash_key(ALICE)} expires=soon\n", "line 1: Invalid isoformat string: 'soon'"),
        (f"alice={hash_key(ALICE)} expires=2030-01-01\n", "expires=2030-01-01"),
        (f"alice={hash_key(ALICE)} streams=many\n", "line 1: streams=many: Input should be a valid integer"),
        (f"alice={hash_key(ALICE)} streams=0\n", "line 1: streams=0: Input should be greater than or equal to 1"),
        (f"jwt:alice={hash_key(ALICE)}\n", "line 1: 'jwt:alice' is no name for a caller"),
    ],
)
def test_a_wrong_keys_file_names_the_line_and_the_remedy(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        Keyring.load(Auth(keys_file=file))
    assert sentence in str(caught.value)
    assert str(file) in str(caught.value)
    assert ALICE not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_keys_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"auth\.keys_file: .* cannot be read"):
        Keyring.load(Auth(keys_file=file))


async def test_a_key_has_a_plan_and_words_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    limits = "plan=gold streams=7 models=qwen*,llama-3 quota_tokens=5000 quota_period=day"
    file.write_text(f"alice={hash_key(ALICE)} {limits}\nbob={hash_key(BOB)}\n")
    plans = {"gold": Plan(requests_per_minute=60, streams=2), "default": Plan(streams=1)}
    gatekeeper = await Gatekeeper.load(Auth(keys_file=file, plans=plans))
    alice = await gatekeeper.authenticate(bearer(ALICE))
    assert alice.plan == Plan(
        requests_per_minute=60, streams=7, models=["qwen*", "llama-3"], quota_tokens=5000, quota_period="day"
    )
    assert [alice.may_ask(model) for model in ("qwen3-8b", "llama-3", "llama-33", "Qwen")] == [True, True, False, False]
    bob = await gatekeeper.authenticate(bearer(BOB))
    assert bob.plan == Plan(streams=1)
    assert bob.may_ask("anything")


def test_a_key_is_good_until_it_expires(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"alice={hash_key(ALICE)} expires=2026-01-01T12:00:00+01:00\n")
    keyring = Keyring.load(Auth(keys_file=file))
    end = datetime(2026, 1, 1, 11, tzinfo=UTC).timestamp()
    assert keyring.find(ALICE, end - 0.001) is not None
    assert keyring.find(ALICE, end) is None


async def test_a_changed_file_is_read_again_and_a_wrong_one_changes_nothing(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gatekeeper = await Gatekeeper.load(Auth(keys_file=keys))
    write(keys, f"bob={hash_key(BOB)}\ncarol={hash_key('carols-key')}\n")
    await gatekeeper.reload()
    assert (await gatekeeper.authenticate(bearer("carols-key"))).name == "carol"
    with pytest.raises(CallerError):
        await gatekeeper.authenticate(bearer(ALICE))
    for wrong in ("", f"bob={BOB}\n"):
        write(keys, wrong)
        await gatekeeper.reload()
        assert (await gatekeeper.authenticate(bearer(BOB))).name == "bob"
        assert "the keys in use stay as they were: auth.keys_file" in caplog.text
        assert BOB not in caplog.text
    write(keys, None)
    await gatekeeper.reload()
    assert (await gatekeeper.authenticate(bearer(BOB))).name == "bob"


async def test_a_file_replaced_behind_a_link_is_read_again(tmp_path: Path) -> None:
    """As Kubernetes replaces a mounted Secret: the name stays, the folder behind it is another."""
    for day, key in (("monday", ALICE), ("tuesday", BOB)):
        (tmp_path / day).mkdir()
        (tmp_path / day / "keys.txt").write_text(f"it={hash_key(key)}\n")
    link = tmp_path / "now"
    link.symlink_to("monday")
    gatekeeper = await Gatekeeper.load(Auth(keys_file=link / "keys.txt"))
    (tmp_path / "next").symlink_to("tuesday")
    (tmp_path / "next").rename(link)
    await gatekeeper.reload()
    assert (await gatekeeper.authenticate(bearer(BOB))).name == "it"


# --- Over HTTP --------------------------------------------------------------------------------------


async def one_word(request: web.Request) -> web.StreamResponse:
    response = await opened(request)
    await response.write(chunks.role() + chunks.content("Hello", tokens=1))
    await silence()
    return response


@pytest.fixture
async def guarded(keys: Path) -> AsyncIterator[tuple[Setup, Seen]]:
    app, seen = engine_app(one_word)
    async with in_front_of(app, auth__keys_file=str(keys)) as setup:
        yield setup, seen


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_a_good_key_is_let_in_and_goes_no_further(keys: Path) -> None:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app, auth__keys_file=str(keys)) as setup:
        for headers in (bearer(ALICE), {"X-Api-Key": BOB}):
            assert (await setup.caller.stream(headers=headers)).text() == "Hello"
            assert "Authorization" not in seen.headers
            assert "X-Api-Key" not in seen.headers
        assert (await setup.caller.get("/v1/models", bearer(ALICE))).status == 200
        assert "Authorization" not in seen.headers


@pytest.mark.parametrize("headers", [*WRONG[:6], WRONG[8], {"Authorization": "Bearer ÿ"}])
async def test_a_wrong_key_gets_a_401_in_the_words_of_the_route(
    guarded: tuple[Setup, Seen], headers: Mapping[str, str]
) -> None:
    setup, seen = guarded
    native = await setup.caller.stream(headers=headers)
    openai = await setup.caller.chat(headers=headers, stream=True)
    for answer in (native, openai, await setup.caller.get("/v1/models", headers)):
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="penstock"'
    assert native.error["origin"] == "client"
    assert openai.error["type"] == "invalid_request_error"
    assert (await setup.caller.delete("st_0", headers)).status == 401
    assert seen.requests == 0


async def test_a_key_that_is_no_text_is_only_a_wrong_key(guarded: tuple[Setup, Seen]) -> None:
    setup, _ = guarded
    async with raw_request(setup.caller.url, b"GET /v1/models HTTP/1.1", b"Authorization: Bearer \xff") as client:
        assert (await client.read_head()).startswith(b"HTTP/1.1 401 ")


async def test_health_and_schema_ask_for_no_key(guarded: tuple[Setup, Seen]) -> None:
    setup, _ = guarded
    for path in ("/healthz", "/readyz", "/v1/schema"):
        assert (await setup.caller.get(path)).status == 200


async def test_nobody_cancels_the_stream_of_another(guarded: tuple[Setup, Seen]) -> None:
    setup, seen = guarded
    body: Json = chat()
    async with setup.caller.opened("/v1/streams", body, bearer(ALICE)) as response:
        await response.content.readuntil(b"Hello")
        stream_id = response.headers["X-Stream-Id"]
        assert (await setup.caller.delete(stream_id, bearer(BOB))).status == 204
        assert (setup.sidecar.server.open_streams, seen.open) == (1, 1)
        assert (await setup.caller.delete(stream_id, bearer(ALICE))).status == 204
        assert b'"status":"cancelled"' in await response.content.read()
    await until(lambda: seen.open == 0)
    assert (await setup.caller.delete("st_nothing", bearer(BOB))).status == 204


async def test_a_revoked_key_is_refused_within_a_moment_and_its_stream_goes_on(keys: Path) -> None:
    app, seen = engine_app(one_word)
    async with (
        in_front_of(app, auth__keys_file=str(keys), auth__reload_seconds=0.02) as setup,
        setup.caller.opened("/v1/streams", chat(), bearer(ALICE)) as response,
    ):
        await response.content.readuntil(b"Hello")
        write(keys, f"bob={hash_key(BOB)}\n")

        async def is_refused() -> bool:
            return (await setup.caller.get("/v1/models", bearer(ALICE))).status == 401

        await until(is_refused)
        assert (await setup.caller.get("/v1/models", bearer(BOB))).status == 200
        assert seen.open == 1


async def test_a_key_asks_only_for_its_models(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"alice={hash_key(ALICE)} models=qwen*\n")
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app, auth__keys_file=str(file)) as setup:
        for refused in (
            await setup.caller.stream(headers=bearer(ALICE), model="tiny"),
            await setup.caller.chat(headers=bearer(ALICE), model="tiny", stream=True),
        ):
            assert (refused.status, refused.error["code"], refused.error["param"]) == (
                403,
                "model_not_allowed",
                "model",
            )
            assert "the key of alice is not for the model 'tiny'; it may ask for qwen*" in refused.error["message"]
        assert seen.requests == 0
        assert (await setup.caller.stream(headers=bearer(ALICE), model="qwen3")).text() == "Hello"


@pytest.mark.parametrize(("models", "seen"), [("*", ["tiny"]), ("ti*", ["tiny"]), ("qwen*", [])])
async def test_a_key_sees_only_its_models(tmp_path: Path, models: str, seen: list[str]) -> None:
    app, _ = engine_app(saying(*chunks.answer_of(["Hello"])))
    async with in_front_of(app, auth__keys={"alice": f"{hash_key(ALICE)} models={models}"}) as setup:
        listed = await setup.caller.get("/v1/models", bearer(ALICE))
        assert [model["id"] for model in listed.json["data"]] == seen
        assert listed.json["object"] == "list"


@pytest.mark.parametrize("body", [b"", b"[]", b'{"data": 7}', b'{"data": [7]}', b'{"error": "no"}'])
def test_what_is_no_list_of_models_stays_as_it_is(body: bytes) -> None:
    assert Caller("alice", Plan(models=["qwen*"])).models_in(body) == body


async def test_a_hang_up_signal_reads_the_keys_at_once_and_stops_nothing(keys: Path) -> None:
    """As `postrotate` of logrotate sends it, and whoever cannot wait for the next look."""
    app, _ = engine_app(saying(*chunks.answer_of(["Hello"])))
    environment = {"PENSTOCK_AUTH__KEYS_FILE": str(keys), "PENSTOCK_AUTH__RELOAD_SECONDS": "3600"}
    async with (
        serving_engine(app) as url,
        serving("serve", "--upstream", url, "--port", "0", environment=environment) as process,
        calling(process.url) as caller,
    ):
        assert (await caller.stream(headers=bearer(ALICE))).text() == "Hello"
        write(keys, f"bob={hash_key(BOB)}\n")
        assert (await caller.get("/v1/models", bearer(ALICE))).status == 200
        process.hang_up()

        async def is_refused() -> bool:
            return (await caller.get("/v1/models", bearer(ALICE))).status == 401

        await until(is_refused)
        assert (await caller.stream(headers=bearer(BOB))).text() == "Hello"
        assert process.is_running
