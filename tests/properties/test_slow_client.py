"""However slowly a client reads, it gets the same answer, in order, and never much waits for it."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.pacing import SlowClient
from penstock.core.signals import ClientBacklog, EngineSpoke
from support import chunks
from support.playbook import STARTED, ask, open_exchange, play
from support.strategies import policies, streams, thorough

REQUEST = ask(n=2, tools=["f", "g"])
BUFFER = 2**14
MEASURES: Any = st.sets(st.sampled_from(["merge", "shed", "pause"])).map(frozenset)
backlogs = st.sampled_from([0, 0, BUFFER // 16, BUFFER // 4, BUFFER // 4 + 1, BUFFER // 2])


@thorough(300)
@given(st.data(), streams(), MEASURES, policies, st.sampled_from(["ndjson", "sse"]))
def test_the_answer_is_the_same(
    data: st.DataObject, frames: list[bytes], measures: Any, policy: Any, form: Any
) -> None:
    setting = {"reasoning": policy, "slow_client": SlowClient(measures, BUFFER, 30.0), "dialect": form}
    steps: list[Any] = list(frames)
    for backlog in data.draw(st.lists(backlogs, max_size=6)):
        steps.insert(data.draw(st.integers(0, len(steps))), ClientBacklog(backlog, STARTED))
    kept_up, lagged = play(REQUEST, frames, **setting), play(REQUEST, steps, **setting)
    assert lagged.contents() == kept_up.contents()
    # A field of the engine goes with the next event that is sent, and that may be another one.
    assert [reasons(finish) for finish in lagged.all_of("finish")] == [reasons(f) for f in kept_up.all_of("finish")]
    assert lagged.record.usage == kept_up.record.usage
    assert lagged.record.ending == kept_up.record.ending
    for name in ("tool_call.ready", "tool_call.end", "warning", "error"):
        told = [[{**event, "seq": 0, "ext": None} for event in outcome.all_of(name)] for outcome in (lagged, kept_up)]
        assert told[0] == told[1]


def reasons(finish: dict[str, Any]) -> list[Any]:
    return [finish[name] for name in ("choice", "reason", "cause", "raw_reason")]


pieces = st.one_of(
    st.integers(1, 700).map(lambda size: chunks.content("x" * size)),
    st.integers(1, 700).map(lambda size: chunks.content("\u6c34" * size, 1)),
    st.integers(1, 200).map(lambda size: chunks.reasoning('"' * size)),
    st.just(chunks.spoken({"content": "t"}, logprobs={"content": [{"token": "t" * 50}]})),
)


@thorough(50)
@given(st.lists(pieces, min_size=50, max_size=150), MEASURES, st.lists(backlogs, max_size=3))
def test_what_waits_is_bounded(said: list[bytes], measures: Any, told: list[int]) -> None:
    """By the buffer, one read of the engine, and what is added to each event in memory."""
    exchange = open_exchange(REQUEST, slow_client=SlowClient(measures - {"pause"}, BUFFER, 30.0))
    exchange.receive(EngineSpoke(chunks.role(), STARTED))
    for backlog in told:
        exchange.receive(ClientBacklog(backlog, STARTED))
    exchange.receive(ClientBacklog(BUFFER // 4 + 1, STARTED))
    for data in said:
        exchange.receive(EngineSpoke(data, STARTED))
        assert exchange.held_bytes <= BUFFER + 4 * len(data)
