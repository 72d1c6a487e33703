"""The channel between a driver and its workers, both ends in one process."""

import contextlib
import math
import os
import random
import select
import struct
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import numpy
import pytest
import torch

from exec_core import messages
from exec_core.errors import MessageTooLargeError
from exec_core.messages import Reply
from exec_core.testing import eventually
from exec_core.wrapper import DONE
from exec_mp import _driver_channel, _layout, _worker_channel
from exec_mp._channel import GATED, NOTHING, Incoming
from exec_mp._driver_channel import DriverChannel, Words
from exec_mp._layout import Geometry
from exec_mp._worker_channel import WorkerChannel

GEOMETRY = Geometry(world_size=2, slots=4, inline_bytes=256, arena_bytes=1 << 24, spin_s=0.0)


def acked_by_all(driver: DriverChannel, call_id: int) -> bytes:
    """What the driver sees when all ranks have acknowledged their calls up to this one, and nothing else has come."""
    return driver.pack_id(call_id) * driver.geometry.world_size + driver.rest


class Ends:
    """A driver's end, and one worker's for each of ``ranks``."""

    def __init__(self, geometry: Geometry, ranks: tuple[int, ...]) -> None:
        self.driver = driver = DriverChannel(geometry, range(geometry.world_size))
        self.workers = {
            rank: WorkerChannel(driver.fd, driver.geometry, rank, driver.bells[rank], driver.bell) for rank in ranks
        }
        self.unsettled: set[int] = set()
        self.requests = {
            rank: worker.requests(self._run, self._run_bare, self.unsettled) for rank, worker in self.workers.items()
        }

    @staticmethod
    def _run(name: str, args: Any, kwargs: Any) -> Reply:
        return DONE if name == "nothing" else Reply((name, args, kwargs))

    @staticmethod
    def _run_bare(name: str) -> Reply:
        return DONE if name == "nothing" else Reply(name)

    def close(self) -> None:
        """Lets go of everything; a worker's end goes with its process, and here with what refers to it."""
        self.driver.close()
        del self.driver, self.workers, self.requests

    def send(self, value: object, ranks: tuple[int, ...] = (0, 1), call_id: int = 7) -> bool:
        """Publishes a request with ``value``, and no name, for its body. Whether there was room."""
        return self.driver.publish(call_id, b"", messages.encode(value), ranks, ranks)

    def next(self, rank: int) -> Incoming:
        """The next request for ``rank``, which it does not acknowledge."""
        request = next(self.requests[rank])
        self.workers[rank].is_answered = True
        return request

    def acknowledge(self, rank: int, call_id: int) -> None:
        """``rank`` runs a call, has nothing to say about it, and goes on to another request."""
        for number in (call_id, call_id + 100):
            self.driver.publish(number, b"load", NOTHING, (rank,), ())
        assert call_id == self.next(rank)[0]
        self.workers[rank].is_answered = False
        assert call_id + 100 == self.next(rank)[0]

    def receive(self, rank: int) -> Any:
        """What the next request for ``rank`` carries."""
        body = self.next(rank)[3]
        assert not isinstance(body, Reply)
        value = messages.decode(*body)
        del body
        self.workers[rank].done_reading()
        return value

    def answer(self, rank: int, value: object, call_id: int = 7) -> None:
        """Publishes a reply of ``rank``."""
        self.workers[rank].publish(call_id, 0, messages.encode(value), 0)

    def take(self, rank: int) -> Any:
        """What the next reply of ``rank`` carries."""
        words = self.driver.look()
        assert words is not None
        number = next(number for of, number in self.driver.replies(words) if of == rank)
        answer = self.driver.open(rank, number, self.driver.take(rank, number))
        assert answer is not None
        value = messages.decode(answer.body, answer.format, owned=answer.owned)
        self.driver.consume(self.up_to(rank, number + 1))
        return value

    def up_to(self, rank: int, number: int) -> Words:
        """The words as they were when so many replies of ``rank`` had come, and of the others those that were taken."""
        half = len(self.driver.seen) // 2
        acks, taken = self.driver.seen[:half], self.driver.seen[half:]
        return acks, taken[: 8 * rank] + struct.pack("<Q", number) + taken[8 * rank + 8 :]

    def rung(self, within_s: float = 0.0) -> bool:
        """Whether the driver's bell has rung."""
        return bool(select.select([self.driver.bell], [], [], within_s)[0])

    def replied(self) -> list[int]:
        """Ranks with a reply in their ring."""
        words = self.driver.look()
        return [] if words is None else sorted({rank for rank, _ in self.driver.replies(words)})


@contextlib.contextmanager
def connected(geometry: Geometry = GEOMETRY, ranks: tuple[int, ...] = (0, 1)) -> Iterator[Ends]:
    """Both ends of a channel."""
    ends = Ends(geometry, ranks)
    try:
        yield ends
    finally:
        ends.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends of a channel of two ranks."""
    with connected() as both:
        yield both


@pytest.fixture(params=[1, 2], ids=["one reader", "two readers"])
def shared(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Both ends of a channel of one rank, then of two."""
    with connected(attrs.evolve(GEOMETRY, world_size=request.param), tuple(range(request.param))) as both:
        yield both


def test_request_carries_everything(ends: Ends) -> None:
    """A request arrives with its id, its name, its body, and whether the value is wanted."""
    value = "x" * GEOMETRY.inline_bytes
    ends.driver.publish(7, b"load", messages.encode(value), (0, 1), (1,))
    wanted = []
    for rank in (0, 1):
        call_id, name, wants_value, body = ends.next(rank)
        assert not isinstance(body, Reply)
        assert (7, "load", value) == (call_id, name, messages.decode(*body))
        wanted.append(wants_value != 0)
        ends.workers[rank].done_reading()

    assert [False, True] == wanted


def test_request_for_another_rank_is_skipped(ends: Ends) -> None:
    """A rank takes its own requests only, in order."""
    ends.send("a", (0,))
    ends.send("b", (1,))
    ends.send("c", (0, 1))

    assert (["a", "c"], ["b", "c"]) == ([ends.receive(0), ends.receive(0)], [ends.receive(1), ends.receive(1)])


def test_ring_goes_round(ends: Ends) -> None:
    """Slots are used again and again."""
    for number in range(50):
        assert ends.send(number)
        assert number + 1 == ends.driver.sent
        assert [number, number] == [ends.receive(0), ends.receive(1)]
        ends.answer(0, -number)
        ends.answer(1, number)
        assert [-number, number] == [ends.take(0), ends.take(1)]


def test_full_ring_takes_no_more(ends: Ends) -> None:
    """When one rank is a whole ring behind there is no room, until it has read on."""
    assert [True] * 4 + [False] * 2 == [ends.send(n) for n in range(6)]
    assert 0 == ends.receive(0)
    assert not ends.send(4)
    assert 0 == ends.receive(1)

    assert ends.send(4)
    assert [1, 2, 3, 4] == [ends.receive(1) for _ in range(4)]


def test_full_reply_ring_waits_for_the_driver(ends: Ends) -> None:
    """A worker whose replies nobody takes waits, and goes on when they are taken."""

    def answer() -> None:
        for number in range(12):
            ends.answer(0, number)

    thread = threading.Thread(target=answer)
    thread.start()
    taken: list[Any] = []
    while len(taken) < 12:
        ends.driver.sleep(0.01, ends.driver.seen)
        while ends.replied():
            taken.append(ends.take(0))
    thread.join()

    assert list(range(12)) == taken


@pytest.mark.parametrize("nbytes", [0, 1, 200, 252, 256, 257, 4096, 70_000, 5 << 20])
def test_message_of_any_size(shared: Ends, nbytes: int) -> None:
    """A message lies in its slot or beside it, and arrives whole either way, for one reader or several."""
    ranks = tuple(shared.workers)
    data = numpy.random.default_rng(0).integers(0, 256, nbytes, dtype=numpy.uint8).tobytes()
    for _ in range(6):
        assert shared.send(data, ranks)
        assert [data] * len(ranks) == [shared.receive(rank) for rank in ranks]
        shared.answer(0, data)
        assert data == shared.take(0)


@pytest.mark.parametrize("elements", [100, 30_000, 1_500_000])
def test_received_memory_is_private(shared: Ends, elements: int) -> None:
    """Each receiver may write into what it got; nobody else sees it, and later messages do not change it."""
    kept: list[tuple[float, Any]] = []
    for number in range(2):
        shared.send(torch.full((elements,), float(number)), tuple(shared.workers))
        for rank in shared.workers:
            value = shared.receive(rank)
            value += 100 * (rank + 1)
            kept.append((number + 100 * (rank + 1), value))
        shared.answer(0, torch.full((elements,), -1.0))
        kept.append((-1.0, shared.take(0)))

    assert [(expected, expected) for expected, _ in kept] == [(v.min().item(), v.max().item()) for _, v in kept]


def test_memory_of_a_view_is_not_used_again(shared: Ends) -> None:
    """A small view of a large message keeps that message's memory, when everything else of it is gone."""
    ranks = tuple(shared.workers)
    shared.send([torch.full((50_000,), 7.0)], ranks)
    part = next(iter([shared.receive(rank)[0][100:103] for rank in ranks]))
    for number in range(8):
        shared.send([torch.full((50_000,), float(number))], ranks)
        assert [number] * len(ranks) == [shared.receive(rank)[0][-1].item() for rank in ranks]

    assert [7.0, 7.0, 7.0] == part.tolist()


def test_memory_is_used_again(ends: Ends) -> None:
    """Far more data than the arena holds goes through it."""
    data = bytes(3 << 20)
    for _ in range(20):
        assert ends.send(data)
        assert 2 * len(data) == len(ends.receive(0)) + len(ends.receive(1))
        ends.answer(1, data)
        assert len(data) == len(ends.take(1))


def test_message_larger_than_the_arena(ends: Ends) -> None:
    """What can never fit is refused at once, both ways, and harms nothing."""
    limit = ends.driver.geometry.arena_bytes
    with pytest.raises(MessageTooLargeError) as caught:
        ends.send(bytes(limit + 1))
    assert limit == caught.value.limit
    with pytest.raises(MessageTooLargeError, match="the result"):
        ends.answer(0, bytes(limit + 1))
    ends.send("after")

    assert "after" == ends.receive(0)


def test_full_arena_takes_no_more(ends: Ends) -> None:
    """While all of the arena is in use there is no room; what is read makes some."""
    assert ends.send(bytes(9 << 20))
    assert not ends.send(bytes(9 << 20))
    ends.receive(0)
    ends.receive(1)

    assert ends.send(bytes(9 << 20))


def test_memory_of_a_reply_is_handed_out_once(ends: Ends) -> None:
    """A reply that was opened and not consumed is known when it is read again; one that lies in its slot is copied again."""
    ends.answer(1, numpy.arange(100_000, dtype=numpy.uint8))
    ends.answer(1, "small")
    large, small = (ends.driver.take(1, number) for number in (0, 1))

    answer = ends.driver.open(1, 0, large)
    assert answer is not None
    assert ends.driver.open(1, 0, large) is None
    for _ in range(2):
        again = ends.driver.open(1, 1, small)
        assert again is not None
        assert "small" == messages.decode(again.body, again.format)
    array = messages.decode(answer.body, answer.format, owned=answer.owned)
    del answer
    ends.driver.consume(ends.up_to(1, 2))
    ends.answer(1, numpy.zeros(100_000, dtype=numpy.uint8))
    assert array.tolist() == numpy.arange(100_000, dtype=numpy.uint8).tolist()
    assert not ends.take(1).any()


def test_more_ranks_than_bits_in_a_word() -> None:
    """Ranks beyond the 64th have their bits too."""
    geometry = attrs.evolve(GEOMETRY, world_size=130)
    with connected(geometry, ranks=(0, 63, 64, 129)) as ends:
        ends.driver.publish(1, b"", messages.encode("odd"), (63, 129), (129,))
        ends.driver.publish(2, b"", messages.encode("all"), tuple(range(130)), (0, 64))
        got = {}
        for rank in (63, 129, 0, 64):
            call_id, _, wants_value, _ = ends.next(rank)
            got[rank] = call_id, wants_value != 0
            ends.workers[rank].done_reading()
        for rank in (129, 64):
            ends.answer(rank, rank)

        assert {63: (1, False), 129: (1, True), 0: (2, True), 64: (2, True)} == got
        assert [64, 129] == ends.replied()
        assert [129, 64] == [ends.take(129), ends.take(64)]


def test_gated_request_waits_for_its_gate(ends: Ends) -> None:
    """A gated request starts when its gate opens; the gate of a later one includes it."""
    body = messages.encode("x")
    for call_id in (1, 2):
        ends.driver.publish(call_id, b"", body, (0, 1), (), GATED)
    got: list[int] = []

    def read() -> None:
        for _ in range(2):
            got.append(ends.next(0)[0])
            ends.workers[0].done_reading()

    thread = threading.Thread(target=read)
    thread.start()
    ends.driver.open_gate(0, ends.driver.sent - 1)
    thread.join(30)

    assert [1, 2] == got


def test_acknowledgements_of_all_ranks_are_seen_at_once(ends: Ends) -> None:
    """What ranks acknowledge is seen without a reply of theirs, the last call standing for those before it."""
    assert ends.driver.look() is None
    ends.acknowledge(0, 8)
    ends.acknowledge(1, 8)
    ends.acknowledge(1, 9)

    words = ends.driver.look()
    assert words is not None
    assert ((8, 9), []) == (ends.driver.acks(words), ends.driver.replies(words))
    ends.driver.consume(words)
    assert ends.driver.look() is None


def test_acknowledgement_does_not_overtake_a_reply(ends: Ends) -> None:
    """Who sees that a later call is acknowledged sees the reply to an earlier one as well."""
    ends.answer(0, "value", call_id=8)
    ends.acknowledge(0, 9)

    words = ends.driver.look()
    assert words is not None
    assert ((9, 0), [(0, 0)]) == (ends.driver.acks(words), ends.driver.replies(words))


def test_acknowledgement_wakes_a_sleeper(ends: Ends) -> None:
    """The bell rings for a driver that sleeps."""
    ends.driver.stay_awake()
    ends.acknowledge(0, 8)
    assert not ends.rung()
    ends.driver.may_sleep()
    ends.acknowledge(0, 9)

    assert ends.rung()


@pytest.mark.parametrize("sleeps", [True, False])
def test_acknowledgement_comes_before_waiting(ends: Ends, sleeps: bool) -> None:
    """A rank that has nothing else to do acknowledges first, and wakes a driver that sleeps."""
    if not sleeps:
        ends.driver.stay_awake()
    ends.driver.publish(8, b"load", NOTHING, (0,), ())
    ends.next(0)
    ends.workers[0].is_answered = False
    thread = threading.Thread(target=list, args=(ends.requests[0],))
    thread.start()
    words = eventually(ends.driver.look)
    rung = ends.rung(within_s=5.0 if sleeps else 0.1)
    ends.driver.publish_exit()
    thread.join(30)

    assert words is not None
    assert (8, 0) == ends.driver.acks(words)
    assert sleeps == rung


def test_acknowledgements_of_one_call_are_known_beforehand(ends: Ends) -> None:
    """What all ranks' acknowledgements look like together, which a reply of any rank changes."""
    complete = acked_by_all(ends.driver, 8)
    ends.acknowledge(1, 8)
    assert complete != ends.driver.glance()
    ends.acknowledge(0, 8)
    assert complete == ends.driver.glance()
    words = ends.driver.words(complete)
    assert not ends.driver.replies(words)
    ends.driver.consume(words)
    assert complete == ends.driver.seen
    assert ends.driver.look() is None
    ends.answer(0, "value", call_id=9)

    words = ends.driver.words(ends.driver.glance())
    assert complete != ends.driver.glance()
    assert ends.driver.replies(words)


def test_acknowledgements_are_known_beforehand_after_replies_too(ends: Ends) -> None:
    """Replies that have been taken are part of what is expected."""
    ends.answer(1, "value")
    assert "value" == ends.take(1)
    complete = acked_by_all(ends.driver, 8)
    assert complete != ends.driver.glance()
    for rank in (0, 1):
        ends.acknowledge(rank, 8)

    assert complete == ends.driver.glance()


@pytest.mark.parametrize("answered", [True, False])
def test_current_call_is_shown(ends: Ends, answered: bool) -> None:
    """The driver sees which call a rank is in, until it goes on to the next request."""
    assert 0 == ends.driver.current(1)[0]
    ends.send(b"", call_id=9)
    ends.next(1)
    call_id = ends.driver.current(1)[0]
    ends.workers[1].done_reading()
    ends.workers[1].is_answered = answered
    ends.driver.publish_exit()
    assert [] == list(ends.requests[1])

    assert 9 == call_id
    assert 0 == ends.driver.current(1)[0]


def test_call_that_was_there_already_begins_when_the_rank_is_ready(ends: Ends) -> None:
    """A rank says when that was: the time at which the call was sent is no measure then."""
    for call_id in (8, 9):
        ends.driver.publish(call_id, b"load", NOTHING, (1,), ())
    assert 8 == ends.next(1)[0]
    left_ns = time.monotonic_ns()
    assert 9 == ends.next(1)[0]

    assert left_ns <= ends.driver.current(1)[1] <= time.monotonic_ns()


def test_call_that_a_rank_waits_for_is_not_timed_by_it(ends: Ends) -> None:
    """It begins when it is sent, which the driver knows."""
    ends.driver.publish(8, b"load", NOTHING, (1,), ())
    assert 8 == ends.next(1)[0]
    with ThreadPoolExecutor(1) as pool:
        awaited = pool.submit(ends.next, 1)
        asleep = ends.driver.geometry.row * _layout.SLEEPS + 1
        eventually(lambda: ends.driver._words[asleep])
        ends.driver.publish(9, b"load", NOTHING, (1,), ())
        assert 9 == awaited.result(30)[0]

    assert 0 == ends.driver.current(1)[1]


def test_gated_call_begins_when_its_gate_opens(ends: Ends) -> None:
    """It was sent before, and the rank has waited for nothing else."""
    ends.driver.publish(8, b"load", NOTHING, (1,), (), GATED)
    opened_ns = time.monotonic_ns()
    ends.driver.open_gate(1, 0)
    assert 8 == ends.next(1)[0]

    assert opened_ns <= ends.driver.current(1)[1] <= time.monotonic_ns()


def test_request_that_leaves_nothing_to_say_is_only_acknowledged(ends: Ends) -> None:
    """It is run where it is read; who asks for requests gets the next one that needs something."""
    for call_id, name in ((8, b"nothing"), (9, b"nothing"), (10, b"something")):
        ends.driver.publish(call_id, name, NOTHING, (0, 1), (0, 1))
    found = ends.next(0)

    assert (10, "something", 1, Reply("something")) == found
    assert (9, 0) == struct.unpack("<2Q", ends.driver.glance()[:16])
    assert 10 == ends.driver.current(0)[0]


def test_request_with_few_arguments_is_run_where_it_is_read(ends: Ends) -> None:
    """It has left its slot by then, which may be used again; its value is told, or only that it has run."""
    for call_id, name in ((8, b"nothing"), (9, b"something")):
        ends.driver.publish(call_id, name, messages.encode(((1, 2), {"a": 3})), (0,), (0,))
    assert (9, "something", 1, Reply(("something", (1, 2), {"a": 3}))) == ends.next(0)

    assert 8 == struct.unpack("<Q", ends.driver.glance()[:8])[0]
    assert 2 == ends.driver._words[ends.driver._shared.word(_layout.REQUESTS_READ, 0)]


class Unloadable:
    """Cannot be unpickled."""

    def __reduce__(self) -> Any:
        return sys.exit, ("not here",)


def test_arguments_that_cannot_be_unpickled_are_an_error_of_the_call(ends: Ends) -> None:
    """Whatever it is that they raise. The method is not run, and the next one is."""
    ends.driver.publish(8, b"something", messages.encode(((Unloadable(),), {})), (0,), (0,))
    ends.driver.publish(9, b"something", messages.encode(((4,), {})), (0,), (0,))
    *_, reply = ends.next(0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.error, SystemExit)
    assert ["while the arguments were being unpickled in the worker"] == reply.error.__notes__

    assert (9, "something", 1, Reply(("something", (4,), {}))) == ends.next(0)


def test_request_is_not_acknowledged_past_one_that_is_unsettled(ends: Ends) -> None:
    """While an earlier call is to be answered yet, who asks for requests gets all of them, and answers."""
    ends.unsettled.add(7)
    ends.driver.publish(8, b"nothing", NOTHING, (0,), ())
    assert (8, "nothing", 0, DONE) == ends.next(0)
    ends.unsettled.clear()
    ends.driver.publish(9, b"nothing", NOTHING, (0,), ())
    ends.driver.publish(10, b"something", NOTHING, (0,), ())
    assert 10 == ends.next(0)[0]

    assert 9 == struct.unpack("<Q", ends.driver.glance()[:8])[0]


def test_exit_reaches_everyone(ends: Ends) -> None:
    """Everyone is told to leave, after what was sent before."""
    ends.send("last", (1,))
    ends.driver.publish_exit()

    assert [] == list(ends.requests[0])
    assert "last" == ends.receive(1)
    assert [] == list(ends.requests[1])


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("room", [1.0, 0.5])
def test_sleeper_is_woken(monkeypatch: pytest.MonkeyPatch, room: float, in_order: bool) -> None:
    """A worker that sleeps is woken by a request, a driver that sleeps by a reply; without one it wakes by itself."""
    for module in (_layout, _driver_channel, _worker_channel):  # elsewhere than on x86-64 with more system calls
        monkeypatch.setattr(module, "IN_ORDER", in_order)
    with connected(attrs.evolve(GEOMETRY, room=room)) as ends:
        check_sleepers(ends)


def check_sleepers(ends: Ends) -> None:
    """See `test_sleeper_is_woken`."""
    assert not ends.driver.sleep(0.001, ends.driver.seen)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(ends.receive(0)))
    thread.start()
    ends.send("wake up", (0,))
    thread.join(30)
    ends.answer(0, "awake")

    assert ["wake up"] == got
    assert ends.driver.sleep(30.0, ends.driver.seen)
    assert "awake" == ends.take(0)


def test_without_foresight_a_long_wait_is_slept_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no processor of its own keeps others from theirs by being awake: it yields only where the last wait was short."""
    now, yielded, slept = 100.0, 0, 0

    def give_way() -> None:
        nonlocal now, yielded
        now, yielded = now + 1 / 128, yielded + 1

    monkeypatch.setattr(_worker_channel, "monotonic", lambda: now)
    monkeypatch.setattr(_worker_channel, "sched_yield", give_way)
    with connected(attrs.evolve(GEOMETRY, slots=16, spin_s=5 / 128, room=0.5)) as ends:

        def wait(takes_s: float) -> tuple[int, int]:
            """A request comes while the rank sleeps, that long after it has. How often it has yielded and slept."""
            nonlocal now, yielded, slept
            comes, yielded, slept = now + takes_s, 0, 0

            def sleep(word: int, value: int, timeout_s: float) -> None:
                nonlocal now, slept
                assert math.inf == timeout_s
                now, slept = max(now, comes), slept + 1
                ends.send("x", (0,))

            monkeypatch.setattr(ends.workers[0], "_sleep", sleep)
            assert "x" == ends.receive(0)
            return yielded, slept

        assert [(5, 1), (0, 1), (0, 1), (5, 1), (5, 1), (0, 1)] == [wait(t) for t in (0.3, 0.3, 0.1, 0.1, 0.3, 0.3)]


@pytest.mark.parametrize(
    ("room", "spread_s", "early_s"),
    [(1.0, 1e-4, 290e-6), (2 / 3, 1e-4, 148e-6), (0.55, 5e-5, 83e-6), (0.55, 2e-4, -math.inf), (0.5, 1e-5, -math.inf)],
)
def test_regular_requests_find_a_rank_awake(
    monkeypatch: pytest.MonkeyPatch, room: float, spread_s: float, early_s: float
) -> None:
    """After a nap: with less room one that is longer, or else a sleep until it is woken. A late request is slept for."""
    now, chance = 100.0, random.Random(7)  # noqa: S311 # no secret
    monkeypatch.setattr(_worker_channel, "monotonic", lambda: now)
    with connected(attrs.evolve(GEOMETRY, slots=512, spin_s=200e-6, room=room)) as ends:

        def wait(takes_s: float) -> list[float]:
            """A request comes after so long. How much earlier than after 3 ms each sleep would have ended by itself."""
            nonlocal now
            began, comes, sent, ends_early_s = now, now + takes_s, False, list[float]()

            def go_on(until: float) -> None:
                nonlocal now, sent
                now = until
                if now >= comes and not sent:
                    sent = True
                    ends.send("x", (0,))

            def sleep(word: int, value: int, timeout_s: float) -> None:
                ends_early_s.append(began + 0.003 - (now + timeout_s))
                go_on(min(comes, now + timeout_s))

            monkeypatch.setattr(_worker_channel, "sched_yield", lambda: go_on(now + 5e-6))
            monkeypatch.setattr(ends.workers[0], "_sleep", sleep)
            assert "x" == ends.receive(0)
            return ends_early_s

        for _ in range(400):
            wait(0.003 + chance.gauss(0, spread_s))
        naps = wait(0.003)

        assert [pytest.approx(early_s, abs=40e-6)] == naps
        assert -math.inf == wait(0.006)[-1]


def test_longest_name_on_its_own(ends: Ends) -> None:
    """A method's name fills its field."""
    name = "n" * messages.NAME_BYTES
    ends.driver.publish(1, name.encode(), NOTHING, (0,), ())

    assert name == ends.next(0)[1]


def test_who_is_awake_is_not_rung(ends: Ends) -> None:
    """The bell rings for a driver that may sleep, not for one that looks."""
    ends.driver.stay_awake()
    ends.answer(0, "seen")
    assert [0] == ends.replied()
    assert not ends.rung()
    ends.driver.may_sleep()
    ends.answer(1, "heard")

    assert ends.rung()
    assert ["seen", "heard"] == [ends.take(0), ends.take(1)]


def test_ranks_are_told_to_spread_once_a_burst_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a request some way into a burst, once, and told where the driver runs; then after the next sleep."""
    told: list[int] = []
    monkeypatch.setattr(_worker_channel, "spread", lambda rank, size, driver: told.append(driver))
    monkeypatch.setattr(_driver_channel, "processor", lambda: 5)
    counts = []
    with connected(attrs.evolve(GEOMETRY, slots=8)) as ends:
        for _ in range(2):
            for _ in range(40):
                assert ends.driver.publish(1, b"load", NOTHING, (0,), ())
                assert 1 == ends.next(0)[0]
                ends.driver.publish(2, b"load", NOTHING, (1,), ())
                assert 2 == ends.next(1)[0]
                counts.append(len(told))
            ends.driver.sleep(0.0, ends.driver.seen)

    assert [5, 5] == told
    assert 0 < counts.index(1) < 39
    assert counts.index(2) > 40


def test_ranks_of_a_burst_spread_while_others_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sleeps meanwhile, and is not concerned, does not put it off."""
    told: list[int] = []
    monkeypatch.setattr(_worker_channel, "spread", lambda rank, size, driver: told.append(rank))
    with connected(attrs.evolve(GEOMETRY, slots=64)) as ends:
        asleep = ends.driver._shared.word(_layout.SLEEPS, 1)
        thread = threading.Thread(target=list, args=(ends.requests[1],))
        thread.start()
        try:
            eventually(lambda: ends.driver._words[asleep])
            for _ in range(20):
                assert ends.driver.publish(1, b"load", NOTHING, (0,), ())
                assert 1 == ends.next(0)[0]
            still_asleep = ends.driver._words[asleep]
        finally:
            ends.driver.publish_exit()
            thread.join(30)

    assert still_asleep
    assert [0] == told


def test_lent_memory_outlives_the_channel() -> None:
    """What the driver has received stays readable and writable after the channel is closed."""
    with connected() as ends:
        ends.answer(0, torch.arange(50_000))
        value = ends.take(0)
        before = len(os.listdir("/proc/self/fd"))
    value += 1

    assert 50_000 == value[-1].item()
    del value
    assert len(os.listdir("/proc/self/fd")) < before
