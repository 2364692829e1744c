"""A server's endpoint and what it hands on, on real sockets: the end of a server, and requests that would take too much."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import zmq

from ekko.config.sections import ServerModelSection
from ekko.train.server import endpoint as endpoint_module
from ekko.train.server import wire as w
from ekko.train.server.checks import refusal_of_pull
from ekko.train.server.coding import decode_answer, encode_request
from ekko.train.server.endpoint import Endpoint
from ekko.train.server.schema import trained_model
from sim_cluster.processes import free_ports

SOON_S = 60
# Of 16 MiB each, to one who takes none: more than the buffers on the way may have, however long that takes.
ANSWERS_MAX = 10


class Noting:
    """Whoever is asked notes it."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.first = asyncio.Event()

    def on_request(self, ask: int, request: w.Request) -> None:
        self.asked.append(ask)
        self.first.set()

    def on_answer(self, answer: w.Answer) -> None:
        raise AssertionError(answer)


def test_an_endpoint_that_was_shut_takes_no_request_and_still_answers() -> None:
    async def run() -> None:
        handler = Noting()
        address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        endpoint = Endpoint(address, handler)
        endpoint.open()
        with zmq.Context() as context, context.socket(zmq.DEALER) as client:
            client.connect(address)
            client.send_multipart(encode_request(1, w.WhoServes("ctr")))
            await asyncio.wait_for(handler.first.wait(), SOON_S)
            client.send_multipart(encode_request(2, w.WhoServes("ctr")))
            endpoint.shut()
            assert await asyncio.to_thread(client.poll, 100) == 0  # by now the second one is there
            endpoint.answer(handler.asked[0], w.Pushed(1, 2))
            assert await asyncio.to_thread(client.poll, 1_000 * SOON_S)
            assert decode_answer(client.recv_multipart()) == (1, w.Pushed(1, 2))
            await asyncio.sleep(0)  # turns that were taken
            assert len(handler.asked) == 1
        endpoint.close()

    asyncio.run(run())


def test_messages_that_are_none_are_counted_answered_where_that_is_possible_and_forgotten() -> None:
    async def run() -> None:
        handler = Noting()
        address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        endpoint = Endpoint(address, handler)
        endpoint.open()
        with zmq.Context() as context, context.socket(zmq.DEALER) as client:
            client.connect(address)
            good = encode_request(7, w.WhoServes("ctr"))
            for junk in ([b""], [b"junk"] * 3, [b"x"] * (4 * w.FRAMES_MAX), [*good, b"one more"], [good[0][:-1]]):
                client.send_multipart(junk)
            client.send_multipart(good)
            await asyncio.wait_for(handler.first.wait(), SOON_S)
            assert (endpoint.malformed, endpoint.waiting) == (5, 1)
            assert await asyncio.to_thread(client.poll, 1_000 * SOON_S)
            number, refused = decode_answer(client.recv_multipart())
            assert number == 7, "of the one that could be understood so far"
            assert isinstance(refused, w.Failed)
            assert refused.kind == w.REFUSED
            assert await asyncio.to_thread(client.poll, 100) == 0
        endpoint.close()

    asyncio.run(run())


def test_who_does_not_take_his_answers_gets_no_more_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "UNSENT_BYTES_MAX", 20 << 20)
    rows = {"item": np.zeros((1 << 16, 64), np.float32), "user": np.zeros((1, 4), np.float32)}  # 16 MiB

    async def until(condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(0.001)

    async def run() -> None:
        handler = Noting()
        address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        endpoint = Endpoint(address, handler)
        endpoint.open()
        with zmq.Context() as context, context.socket(zmq.DEALER) as slow, context.socket(zmq.DEALER) as quick:
            slow.set(zmq.RCVHWM, 1)
            for client in (slow, quick):
                client.connect(address)
            for number in range(1, ANSWERS_MAX + 1):
                slow.send_multipart(encode_request(number, w.WhoServes("ctr")))
                await until(lambda number=number: len(handler.asked) == number)  # type: ignore[misc]
                if endpoint.is_behind(number):
                    break
                endpoint.answer(number, w.Pulled(rows, 0))
            assert 2 < number < ANSWERS_MAX, "what one answer has may always leave, and no more than that waits for long"
            quick.send_multipart(encode_request(1, w.WhoServes("ctr")))
            await until(lambda: len(handler.asked) == number + 1)
            assert not endpoint.is_behind(number + 1), "others are not held up"
            for _ in range(number - 1):
                assert await asyncio.to_thread(slow.poll, 1_000 * SOON_S)
                slow.recv_multipart()
            await until(lambda: not endpoint.is_behind(number))
        endpoint.close()

    asyncio.run(asyncio.wait_for(run(), 2 * SOON_S))


def test_a_pull_whose_answer_no_message_may_have_is_refused_before_memory_is_taken() -> None:
    tables = {"wide": {"dim": 16_384, "optimizer": {"name": "sgd", "lr": 0.1}}}
    model = trained_model("ctr", ServerModelSection(partitions=2, tables=tables), 64)
    keys = np.arange(w.KEYS_MAX, dtype=np.uint64)  # 64 GiB of rows in a message of 8 MiB
    refusal = refusal_of_pull(model, w.Pull("ctr", w.OBSERVER, 0, 0, (0, 1), {"wide": keys}))
    assert refusal is not None
    assert refusal.kind == w.REFUSED
    assert "ask for fewer rows" in refusal.reason
    assert refusal_of_pull(model, w.Pull("ctr", w.OBSERVER, 0, 0, (0, 1), {"wide": keys[:1_000]})) is None
