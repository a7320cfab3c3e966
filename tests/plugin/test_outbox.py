"""What waits for a sidecar is bounded in bytes; a step goes whole or not at all, and who lost it is told."""

import asyncio

import pytest

from penstock.core.frames import Lost, Record, Tokens, read_message
from penstock_vllm import frames
from penstock_vllm.frames import Channel
from penstock_vllm.outbox import DEFAULT_BYTES, SETTING, Outbox, most_bytes

TOKEN_BYTES = len(frames.tokens(1, 0, Channel.ANSWER, [5]))


class Box:
    """An outbox with room for `tokens` records, and what it lost."""

    def __init__(self, tokens: int) -> None:
        self.lost: list[int] = []
        self.outbox = Outbox(tokens * TOKEN_BYTES, self.lost.extend)

    def step(self, *streams: int) -> None:
        for stream in streams:
            self.outbox.put(frames.tokens(stream, 0, Channel.ANSWER, [5]))
        self.outbox.commit()

    async def sent(self) -> list[Record]:
        message = await asyncio.wait_for(self.outbox.next(), 5)
        assert isinstance(message, bytes)
        return read_message(message)


async def test_steps_that_waited_go_in_one_message() -> None:
    box = Box(9)
    box.step(1, 2)
    box.step(1)
    assert [record.stream for record in await box.sent()] == [1, 2, 1]


async def test_an_empty_step_is_no_message() -> None:
    box = Box(9)
    box.outbox.commit()
    sent = asyncio.create_task(box.sent())
    await asyncio.sleep(0)
    assert not sent.done()
    box.step(3)
    assert [record.stream for record in await sent] == [3]


async def test_a_step_that_does_not_fit_is_lost_whole_and_told_when_there_is_room() -> None:
    box = Box(3)
    box.step(1, 2)
    box.step(2, 3, 2)
    assert box.lost == [2, 3]
    assert box.outbox.waiting_bytes == 2 * TOKEN_BYTES
    # There is room for the news behind what waits, so it goes with it: after the stream's own last tokens.
    assert [type(record) for record in await box.sent()] == [Tokens, Tokens, Lost, Lost]
    assert box.lost == [2, 3]


async def test_what_is_on_its_way_counts_until_the_next_message_is_asked_for() -> None:
    box = Box(2)
    box.step(1, 1)
    await box.sent()
    box.step(2)
    assert box.lost == [2]
    assert await box.sent() == [Lost(2, 1)]
    box.step(3)
    assert box.lost == [2]


async def test_a_single_step_larger_than_the_outbox_is_lost_and_told() -> None:
    box = Box(2)
    box.step(4, 5, 4)
    assert box.lost == [4, 5]
    assert await box.sent() == [Lost(4, 1), Lost(5, 1)]


async def test_news_of_losses_waits_for_room_like_everything_else() -> None:
    box = Box(1)
    box.step(1)
    box.step(*range(2, 40))
    first = await box.sent()
    assert [type(record) for record in first] == [Tokens]
    assert await box.sent() == [Lost(number, 1) for number in range(2, 40)]


async def test_a_refusal_goes_as_text_in_its_turn() -> None:
    box = Box(9)
    box.step(1)
    box.outbox.put_text(2, '{"op": "refused"}')
    box.step(3)
    first, refusal, last = [await box.outbox.next() for _ in range(3)]
    assert isinstance(first, bytes)
    assert refusal == '{"op": "refused"}'
    assert isinstance(last, bytes)
    assert [record.stream for record in read_message(first) + read_message(last)] == [1, 3]


async def test_a_refusal_that_does_not_fit_is_a_loss() -> None:
    box = Box(1)
    box.outbox.put_text(7, "x" * (TOKEN_BYTES + 1))
    assert box.lost == [7]
    assert await box.sent() == [Lost(7, 1)]


async def test_a_message_is_not_larger_than_what_the_transport_should_hold() -> None:
    box = Box(100_000)
    for _ in range(60):
        box.step(*range(1, 1001))
    sizes: list[int] = []
    while box.outbox.waiting_bytes > (sizes[-1] if sizes else 0):
        message = await box.outbox.next()
        sizes.append(len(message) - 1)
    assert sum(sizes) == 60 * 1000 * TOKEN_BYTES
    assert max(sizes) <= 256 * 1024


def test_the_bound_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    assert most_bytes() == DEFAULT_BYTES == 4 * 1024 * 1024
    monkeypatch.setenv(SETTING, "1000")
    assert most_bytes() == 1000
    monkeypatch.setenv(SETTING, "4 MiB")
    with pytest.raises(ValueError, match="PENSTOCK_OUTBOX_BYTES is '4 MiB'; it must be a number of bytes"):
        most_bytes()
