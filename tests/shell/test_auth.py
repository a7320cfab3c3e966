"""API keys: who gets in, whose stream is whose, and what a caller without a key is told."""

from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from aiohttp import web

from penstock.core.errors import CallerError
from penstock.settings import Auth, SettingsError
from penstock.shell.auth import ANONYMOUS, Keyring, hash_key
from support import chunks
from support.http_client import Json, chat
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


# --- The keyring ------------------------------------------------------------------------------------


def test_without_keys_everybody_is_anonymous() -> None:
    keyring = Keyring.load(Auth())
    assert not keyring
    assert keyring.authenticate({}) == ANONYMOUS


def test_keys_come_from_the_file_and_the_settings(keys: Path) -> None:
    keyring = Keyring.load(Auth(keys_file=keys, keys={"carol": hash_key("carols-key")}))
    assert keyring
    assert keyring.authenticate(bearer(ALICE)) == "alice"
    assert keyring.authenticate({"Authorization": f"bearer   {BOB}"}) == "bob"
    assert keyring.authenticate({"X-Api-Key": "carols-key"}) == "carol"


@pytest.mark.parametrize("headers", WRONG)
def test_any_other_key_is_refused_with_a_challenge(keys: Path, headers: Mapping[str, str]) -> None:
    with pytest.raises(CallerError) as caught:
        Keyring.load(Auth(keys_file=keys)).authenticate(headers)
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
