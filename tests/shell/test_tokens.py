"""Tokens: which are let in, whose streams they own, and what happens when the issuer rotates its keys or is gone."""

import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from penstock.access_settings import Auth, JwtSettings, Plan
from penstock.core.errors import CallerError, Overloaded
from penstock.settings import SettingsError, load_settings
from penstock.shell import tokens
from penstock.shell.auth import hash_key
from penstock.shell.tokens import Tokens
from support import chunks
from support.issuer import Issuer, issuing
from support.sockets import until
from support.upstreams import engine_app, in_front_of, saying

KEY = "alices-key-0123456789"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with issuing() as running:
        yield running


def checker(issuer: Issuer, clock: Clock | None = None, plans: dict[str, Plan] | None = None, **more: Any) -> Tokens:
    settings = JwtSettings.model_validate(issuer.settings(**more))
    return Tokens(settings, Auth(jwt=settings, plans=plans or {}), clock or Clock())


async def refused(checker: Tokens, token: str) -> CallerError:
    with pytest.raises(CallerError) as caught:
        await checker.caller(token)
    return caught.value


# --- Which are good -------------------------------------------------------------------------------------


async def test_a_good_token_is_its_subject_and_never_a_keys_holder(issuer: Issuer) -> None:
    caller = await checker(issuer).caller(issuer.token("alice"))
    assert (caller.name, caller.plan) == ("jwt:alice", Plan())


async def test_other_claims_may_name_caller_and_plan(issuer: Issuer) -> None:
    plans = {"gold": Plan(streams=9)}
    check = checker(issuer, plans=plans, principal_claim="email", plan_claim="tier")
    caller = await check.caller(issuer.token(email="carol@example", tier="gold"))
    assert (caller.name, caller.plan) == ("jwt:carol@example", Plan(streams=9))
    assert (await check.caller(issuer.token(email="carol@example"))).plan == Plan()
    problem = await refused(check, issuer.token(email="carol@example", tier="platinum"))
    assert (problem.status, problem.code) == (403, "no_such_plan")


@pytest.mark.parametrize(
    ("claims", "sentence"),
    [
        ({"exp": 1}, "the token has expired"),
        ({"exp": None}, "the token has no claim 'exp'"),
        ({"exp": "later"}, "not good"),
        ({"nbf": 4_000_000_000}, "not yet valid"),
        ({"iat": "soon"}, "not good"),
        ({"aud": "another"}, "for another audience; this is penstock"),
        ({"aud": None}, "no claim 'aud'"),
        ({"iss": "https://evil.example/"}, "from another issuer; trusted is https://login.example/"),
        ({"iss": None}, "no claim 'iss'"),
        ({"subject": None}, "no claim 'sub'"),
        ({"subject": ""}, "sub is no name"),
        ({"subject": "a\nstream st_1 ended"}, "sub is no name"),
        ({"subject": "x" * 300}, "sub is no name"),
    ],
)
async def test_a_token_that_is_not_good_says_what_is_wrong(
    issuer: Issuer, claims: dict[str, Any], sentence: str
) -> None:
    problem = await refused(checker(issuer), issuer.token(**claims))
    assert (problem.status, problem.code) == (401, "invalid_token")
    assert sentence in problem.message
    assert problem.headers["WWW-Authenticate"] == 'Bearer realm="penstock", error="invalid_token"'


async def test_clocks_may_differ_by_the_leeway(issuer: Issuer) -> None:
    late = issuer.token(exp=int(time.time()) - 10)
    assert (await checker(issuer).caller(late)).name == "jwt:carol"
    assert "has expired" in (await refused(checker(issuer, leeway_seconds=5), late)).message


async def test_a_scope_may_be_asked_for(issuer: Issuer) -> None:
    check = checker(issuer, scope="stream")
    good: list[dict[str, Any]] = [{"scope": "read stream"}, {"scp": ["stream"]}]
    for claims in good:
        assert (await check.caller(issuer.token(**claims))).name == "jwt:carol"
    bad: list[dict[str, Any]] = [{}, {"scope": "streams"}, {"scope": 7}]
    for claims in bad:
        problem = await refused(check, issuer.token(**claims))
        assert (problem.status, problem.code) == (403, "insufficient_scope")


def unsigned(head: Any, claims: Any = None) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (head, claims or {})]
    return ".".join([*parts, ""])


async def test_no_other_signature_will_do(issuer: Issuer) -> None:
    check = checker(issuer)
    assert (await check.caller(issuer.token())).name == "jwt:carol"
    stranger = Issuer(key=1)
    for token, sentence in (
        (issuer.token()[:-4] + "AAAA", "wrong signature"),
        (stranger.token(), "wrong signature"),
        (issuer.token(algorithm="RS512"), "signed by 'RS512', which is none of auth.jwt.algorithms (RS256, ES256)"),
        (issuer.token(algorithm="HS256", key="s" * 64), "signed by 'HS256'"),
        (unsigned({"alg": "none", "typ": "JWT"}), "signed by 'none'"),
        (unsigned({"alg": "ES256", "kid": "rsa-1"}), "is none of its issuer's"),
        (unsigned({"alg": ["RS256"]}), "signed by ['RS256']"),
        (unsigned({"alg": "RS256", "kid": {}}), "no JWT"),
        (unsigned([]), "no JWT"),
        ("..", "no JWT"),
        ("a.b.c", "no JWT"),
        ("\udcff.\udcff.\udcff", "no JWT"),
        (base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=") + ".e30.", "no JWT"),
    ):
        problem = await refused(check, token)
        assert (problem.status, problem.code) == (401, "invalid_token")
        assert sentence in problem.message, token


async def test_keys_that_are_not_for_signing_do_not_count(issuer: Issuer) -> None:
    issuer.published[0]["use"] = "enc"
    assert "none of its issuer's" in (await refused(checker(issuer), issuer.token())).message


async def test_without_a_key_id_only_one_key_leaves_no_doubt(issuer: Issuer) -> None:
    token = issuer.token(head={"kid": None})
    assert (await checker(issuer).caller(token)).name == "jwt:carol"
    issuer.published.append({**Issuer(key=1).published[0], "kid": "other"})
    assert "none of its issuer's" in (await refused(checker(issuer), token)).message


# --- The issuer's keys ----------------------------------------------------------------------------------


async def test_keys_are_fetched_once_and_again_when_they_are_old(issuer: Issuer) -> None:
    clock = Clock()
    check = checker(issuer, clock)
    for _ in range(5):
        await check.caller(issuer.token())
    assert issuer.asked == 1
    clock.now += 301
    await check.caller(issuer.token())  # served with the old keys; the new ones come beside it
    await until(lambda: issuer.asked == 2)
    clock.now += 11
    issuer.rotate("rsa-2")
    await check.caller(issuer.token(key_id="rsa-2"))
    assert issuer.asked == 3


async def test_a_rotated_key_is_found_at_once_but_not_for_every_stranger(issuer: Issuer) -> None:
    clock = Clock()
    check = checker(issuer, clock)
    await check.caller(issuer.token())
    clock.now += 11
    issuer.rotate("ec-1", elliptic=True)
    assert (await check.caller(issuer.token(key_id="ec-1", algorithm="ES256"))).name == "jwt:carol"
    assert "'rsa-1' is none of its issuer's" in (await refused(check, issuer.token())).message
    asked = issuer.asked
    for _ in range(20):
        await refused(check, issuer.token(head={"kid": "made-up"}, key_id="ec-1", algorithm="ES256"))
    assert issuer.asked == asked


async def test_while_the_issuer_is_gone_its_keys_count_until_they_are_stale(issuer: Issuer) -> None:
    clock = Clock()
    check = checker(issuer, clock, stale_seconds=1000)
    issuer.is_gone = True
    with pytest.raises(Overloaded) as caught:
        await check.caller(issuer.token())
    assert (caught.value.status, caught.value.code) == (503, "issuer_unavailable")
    assert caught.value.headers == {"Retry-After": "5"}
    issuer.is_gone, clock.now = False, clock.now + 11
    await check.caller(issuer.token())
    issuer.is_gone, clock.now = True, clock.now + 999
    await check.caller(issuer.token())
    await check.close()
    clock.now += 20
    with pytest.raises(Overloaded):
        await check.caller(issuer.token())
    issuer.is_gone, clock.now = False, clock.now + 11
    await check.caller(issuer.token())


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"keys": 7}', b'{"keys": [{}]}', b"\xff", b"[" * 4000])
async def test_an_issuer_that_talks_nonsense_is_as_good_as_gone(
    issuer: Issuer, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nonsense(_: str) -> bytes:
        return body

    monkeypatch.setattr(tokens, "_read", nonsense)
    with pytest.raises(Overloaded):
        await checker(issuer).caller(issuer.token())


# --- Over HTTP, and the settings ------------------------------------------------------------------------


async def test_keys_and_tokens_side_by_side(issuer: Issuer) -> None:
    app, seen = engine_app(saying(*chunks.answer_of(["Hello"])))
    keys = {"carol": hash_key(KEY)}
    async with in_front_of(app, auth__jwt=issuer.settings(), auth__keys=keys) as setup:
        by_token = {"Authorization": f"Bearer {issuer.token('carol')}"}
        assert (await setup.caller.stream(headers=by_token)).text() == "Hello"
        assert (await setup.caller.stream(headers={"X-Api-Key": KEY})).text() == "Hello"
        assert "Authorization" not in seen.headers
        expired = await setup.caller.chat(headers={"Authorization": f"Bearer {issuer.token(exp=1)}"}, stream=True)
        assert (expired.status, expired.error["code"]) == (401, "invalid_token")
        issuer.is_gone = True
        assert (await setup.caller.stream(headers={"X-Api-Key": KEY})).text() == "Hello"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"algorithms": ["HS256"]}, r"auth\.jwt\.algorithms\.0: 'HS256' .* is wrong"),
        ({"algorithms": []}, r"auth\.jwt\.algorithms: \[\]"),
        ({"jwks_url": "file:///etc/passwd"}, r"auth\.jwt\.jwks_url: .* must be a URL like https"),
        ({"audience": ""}, r"auth\.jwt\.audience: ''"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], sentence: str) -> None:
    good = {"issuer": "i", "audience": "a", "jwks_url": "https://i/keys"}
    with pytest.raises(SettingsError, match=sentence):
        load_settings(
            environment={}, flags={"upstreams": [{"url": "http://vllm:8000"}], "auth.jwt": {**good, **changes}}
        )


async def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "jwt", None)
    settings = JwtSettings(issuer="i", audience="a", jwks_url="https://i/keys")
    with pytest.raises(SettingsError, match=r"needs the extra `jwt`: pip install 'penstock\[jwt\]'"):
        Tokens.load(Auth(jwt=settings))
