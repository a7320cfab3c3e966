"""Moderation over real connections: settings, halts that reach the engine, rules that change while it runs."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from openai import ContentFilterFinishReasonError

from penstock.moderation_settings import ModerationSettings
from penstock.settings import SettingsError, load_settings
from penstock.shell.replay import serving
from penstock.shell.rulebook import Rulekeeper, load_rulebook
from support import chunks, openai_client
from support.sockets import until
from support.upstreams import engine_app, in_front_of, opened, saying, silence

CODENAME = {"id": "codename", "literal": "Project Zephyr"}
TICKET = {"id": "ticket", "regex": "TKT-[0-9]{6}", "action": "halt", "category": "internal"}
RULES = [CODENAME, TICKET]


@pytest.mark.usefixtures("no_blocking_calls")
async def test_a_redacted_answer_in_every_form() -> None:
    engine, _ = engine_app(saying(*chunks.answer_of(list("It is Project Zephyr."))))
    async with in_front_of(engine, moderation__rules=RULES) as setup:
        sse = await setup.caller.stream()
        assert sse.text() == "It is [redacted]."
        assert sse.one("moderation")["rule"] == "codename"
        folded = await setup.caller.stream("application/json")
        assert folded.json["choices"][0]["text"] == "It is [redacted]."
        assert folded.json["moderation"][0]["action"] == "redact"
        chat = await setup.caller.chat(stream=True)
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chat.chunks) == "It is [redacted]."
        for answer in (sse, folded, chat):
            assert b"Zephyr" not in answer.body


@pytest.mark.usefixtures("no_blocking_calls")
async def test_a_halt_aborts_the_engine() -> None:
    async def goes_on(request: Any) -> Any:
        response = await opened(request)
        for piece in (chunks.role(), chunks.content("See TKT-12"), chunks.content("3456!")):
            await response.write(piece)
        await silence()
        return response

    engine, seen = engine_app(goes_on)
    async with in_front_of(engine, moderation__rules=RULES) as setup:
        answer = await setup.caller.stream()
        assert answer.text() == "See "
        assert answer.finish()["reason"] == "content_filter"
        await until(lambda: seen.open == 0)
        assert seen.left == 1


@pytest.mark.usefixtures("no_blocking_calls")
async def test_rules_are_read_again_without_a_restart(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    await asyncio.to_thread(rules.write_text, "rules: [{id: a, literal: alpha}]\n")
    engine, _ = engine_app(saying(*chunks.answer_of(["alpha beta"])))
    async with in_front_of(engine, moderation__packs=[str(rules)], moderation__reload_seconds=0.02) as setup:
        assert (await setup.caller.stream()).text() == "[redacted] beta"
        await asyncio.to_thread(rules.write_text, "rules: [{id: b, regex: 'beta+'}]\n")  # + has no bound
        await asyncio.sleep(0.2)
        assert (await setup.caller.stream()).text() == "[redacted] beta"
        await asyncio.to_thread(rules.write_text, "rules: [{id: bee, literal: beta}]\n")
        for _ in range(200):
            if (answer := await setup.caller.stream()).text() == "alpha [redacted]":
                break
            await asyncio.sleep(0.02)
        assert answer.text() == "alpha [redacted]"


@pytest.mark.parametrize("ask", [openai_client.complete, openai_client.stream, openai_client.final_completion])
@pytest.mark.parametrize("cause", ["rule", "classifier"])
async def test_the_openai_sdk_sees_content_filter(ask: Any, cause: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if (await request.json()).get("stream"):
            return await saying(*chunks.answer_of(["See ", "TKT-123456", "!"]))(request)
        return web.Response(body=chunks.whole({"content": "See TKT-123456!"}), content_type="application/json")

    async def judge(request: web.Request) -> web.Response:
        flagged = "TKT" in (await request.json())["input"]
        return web.json_response({"results": [{"flagged": flagged, "categories": {}}]})

    app = web.Application()
    app.add_routes([web.post("/judge", judge)])
    async with serving(app) as url:
        classifier = {"url": f"{url}/judge", "mode": "gate", "timeout_ms": 20000}
        moderation = {"rules": RULES} if cause == "rule" else {"classifiers": [classifier]}
        async with in_front_of(engine_app(answer)[0], moderation=moderation) as setup:
            request = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
            if ask is openai_client.final_completion:  # the SDK's own word for it
                with pytest.raises(ContentFilterFinishReasonError):
                    await ask(setup.sidecar.url, "async", request)
                return
            said = await ask(setup.sidecar.url, "async", request)
    [choice] = said["choices"]
    assert choice["finish_reason"] == "content_filter"
    told = choice.get("message") or choice.get("delta")
    assert told.get("content", "") == ("See " if cause == "rule" else "")


async def test_the_bill_of_a_halted_stream_counts_what_was_generated_and_what_was_sent(tmp_path: Path) -> None:
    """Billed are the prompt and all tokens until the halt. The tokens of one read go with its last letter."""
    pieces = [chunks.content(text, tokens=n) for n, text in enumerate(["See ", "TKT-", "123", "456", "!"], 1)]
    path = tmp_path / "usage.jsonl"
    engine, _ = engine_app(saying(*chunks.answer(*pieces)))
    async with in_front_of(engine, moderation__rules=RULES, usage__file={"path": str(path)}) as setup:
        answer = await setup.caller.stream()
    [record] = [json.loads(line) for line in (await asyncio.to_thread(path.read_text)).splitlines()]
    usage = answer.usage
    assert usage["delivered_tokens"] <= 1
    assert usage["bytes"]["delivered"] == len("See ")
    assert usage["bytes"]["generated"] == usage["bytes"]["delivered"] + usage["bytes"]["moderation"]
    assert (record["ending"], record["delivered_tokens"]) == ("halted", usage["delivered_tokens"])
    assert record["billed_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] >= 4


WRONG_FILES = {
    "no yaml": "rules: [",
    "no rules": "rules: []",
    "another shape": "- 7",
    "empty": "",
    "unbounded": "rules: [{id: b, regex: 'beta+'}]",
    "unknown key": "rules: [{id: b, literal: beta, actoin: halt}]",
    "twice": "rules: [{id: b, literal: beta}, {id: b, literal: gamma}]",
    "too much": "rules: [{id: b, regex: 'a{1,99999999999999}'}]",
    "too deep": "rules: [{id: b, regex: '" + "(" * 3000 + "a" + ")" * 3000 + "'}]",
    "no text": b"rules: [{id: b, literal: \xff\xfe}]",
    "a tag": "rules: !!python/object/apply:os.getcwd []",
    "gone": None,
}


@pytest.mark.parametrize("wrong", WRONG_FILES.values(), ids=WRONG_FILES)
async def test_a_wrong_file_changes_nothing_says_so_and_is_watched_on(
    wrong: str | bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [{id: a, literal: alpha}]\n")
    keeper = Rulekeeper.load(ModerationSettings.model_validate({"packs": [str(rules)]}))
    before = keeper.rulebook
    if wrong is None:
        rules.unlink()
    else:
        rules.write_bytes(wrong.encode() if isinstance(wrong, str) else wrong)
    await keeper.reload()
    assert keeper.rulebook is before
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith("the moderation rules in force stay as they were: ")
    await keeper.reload()
    assert len(caplog.records) == 1, "it is said once a change"
    rules.write_text("rules: [{id: bee, literal: beta}]\n")
    await keeper.reload()
    assert keeper.rulebook is not None
    assert [rule.id for rule in keeper.rulebook.rules] == ["bee"]


async def test_the_word_lists_of_packs_and_rules_are_watched(tmp_path: Path) -> None:
    words, more = tmp_path / "words.txt", tmp_path / "more.txt"
    for path in (words, more):
        path.write_text("alpha # a comment\n")
    pack = tmp_path / "pack.yaml"
    pack.write_text(f"rules: [{{id: listed, words_file: {words}}}]\n")
    settings = {"packs": ["profanity", str(pack)], "rules": [{"id": "more", "words_file": str(more)}]}
    keeper = Rulekeeper.load(ModerationSettings.model_validate(settings))
    digests = [keeper.rulebook.digest] if keeper.rulebook else []
    for path in (words, more):
        path.write_text("alpha\nbeta\n")
        await keeper.reload()
        assert keeper.rulebook is not None
        digests.append(keeper.rulebook.digest)
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"literal": "betas"},
        {"action": "halt"},
        {"category": "other"},
        {"placeholder": "#"},
        {"channels": ["answer"]},
        {"models": ["m"]},
        {"keys": ["k"]},
        {"ignore_case": False},
        {"whole_word": True},
    ],
    ids=str,
)
def test_rules_that_differ_have_different_names_in_the_audit(change: dict[str, Any]) -> None:
    one, other, same = (
        load_rulebook(ModerationSettings.model_validate({"rules": [{"id": "b", "literal": "beta", **more}]}))
        for more in ({}, change, {})
    )
    assert one is not None
    assert other is not None
    assert same is not None
    assert one.digest == same.digest != other.digest


async def test_a_stream_keeps_the_rules_that_it_began_with(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    await asyncio.to_thread(rules.write_text, "rules: [{id: a, literal: alpha}]\n")
    may_go_on = asyncio.Event()

    async def slowly(request: Any) -> Any:
        response = await opened(request)
        await response.write(chunks.role() + chunks.content("alpha, "))
        if (await request.json())["messages"][0]["content"] == "slowly":
            await may_go_on.wait()
        for piece in chunks.answer_of(["alpha beta"])[1:]:
            await response.write(piece)
        return response

    engine, seen = engine_app(slowly)
    async with in_front_of(engine, moderation__packs=[str(rules)], moderation__reload_seconds=0.02) as setup:
        old = asyncio.create_task(setup.caller.stream(messages=[{"role": "user", "content": "slowly"}]))
        await until(lambda: seen.open == 1)
        await asyncio.to_thread(rules.write_text, "rules: [{id: bee, literal: beta}]\n")

        async def are_new_rules_in_force() -> bool:
            return (await setup.caller.stream()).text() == "alpha, alpha [redacted]"

        await until(are_new_rules_in_force)
        may_go_on.set()
        assert (await old).text() == "[redacted], [redacted] beta"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"regex": "a{1,99999999999}"}, "is no regular expression"),
        ({"regex": "(" * 3000 + "a" + ")" * 3000}, "nested too deeply"),
        ({"regex": "a+"}, "matches without bound"),
        ({"regex": "a{1,9000}"}, "hold_chars"),
        ({"regex": "(?<=a)b"}, "looks around"),
        ({"regex": r"(a)\1"}, "refers back"),
        ({"regex": "^a"}, "has no lines"),
        ({"regex": r"a\bb"}, "has no lines"),
        ({"regex": r"a:\b"}, "beside what may be no ASCII letter"),
        ({"regex": r"\b.{3}"}, "beside what may be no ASCII letter"),
        ({"regex": r"\b(?:x|[а-я])y\b"}, "beside what may be no ASCII letter"),
        ({"regex": "(?:a{1,50}){1,50}b"}, "exponential time"),
        ({"regex": "(?:a|ab|b){2,30}c"}, "exponential time"),
        ({"regex": "a{0,500}a{0,500}b"}, "too many ways"),
        ({"regex": "a{0,3}"}, "matches the empty text"),
        ({"regex": "("}, "is no regular expression"),
        ({"regex": "a(?>b)c"}, "atomic"),
        ({"regex": "a(?i:b)c"}, "switches a flag"),
        ({"literal": "\u200b"}, "invisible characters alone"),
        ({"regex": "a", "literal": "b"}, "exactly one of"),
        ({"regex": "a", "check": "feeling"}, "is none of"),
        ({"regex": "a", "whole_word": True}, "whole_word is for literals"),
        ({"words_file": "/nowhere/words"}, "cannot be read"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused_with_the_reason(rule: dict[str, Any], words: str) -> None:
    flags = {"upstreams": [{"url": "http://x"}], "moderation.rules": [{"id": "r", **rule}]}
    with pytest.raises(SettingsError, match=words):
        load_rulebook(load_settings(environment={}, flags=flags).moderation)


def test_an_unknown_pack_and_two_rules_of_one_name_are_refused() -> None:
    def load(**moderation: Any) -> None:
        flags = {"upstreams": [{"url": "http://x"}], "moderation": moderation}
        load_rulebook(load_settings(environment={}, flags=flags).moderation)

    with pytest.raises(SettingsError, match=r"'pi' is no pack; there are .*profanity"):
        load(packs=["pi"])
    with pytest.raises(SettingsError, match="two rules are called 'codename'"):
        load(rules=[CODENAME, CODENAME])
