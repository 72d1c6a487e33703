"""A rank that runs a resident call: the others are sent any number of requests meanwhile, and it finds its next one."""

import threading
from collections.abc import Iterator

import pytest

from exec_core.messages import Reply
from exec_core.testing import eventually
from exec_core.testing.interrupts import interrupted
from exec_core.wrapper import DONE
from exec_mp._channel import AWAY, NOTHING
from exec_mp._driver_channel import DriverChannel
from exec_mp._layout import Geometry
from exec_mp._worker_channel import WorkerChannel

SLOTS = 4
GEOMETRY = Geometry(world_size=2, slots=SLOTS, inline_bytes=256, arena_bytes=1 << 24, spin_s=0.0)
STAY = b"stay"


class Ends:
    """A driver's end, and two ranks that run what they are asked to, each in a thread.

    Attributes:
        ran: by rank, the methods that it has run.
        leave: lets a rank end its resident call.
    """

    def __init__(self) -> None:
        self.driver = DriverChannel(GEOMETRY, (0, 1))
        self.ran: dict[int, list[str]] = {0: [], 1: []}
        self.inside, self.leave = threading.Event(), threading.Event()
        self._calls = 0
        self._ranks = [threading.Thread(target=self._serve, args=(rank,)) for rank in (0, 1)]

    def start(self, rank: int) -> None:
        """Lets ``rank`` begin to read."""
        self._ranks[rank].start()

    def _serve(self, rank: int) -> None:
        driver = self.driver
        end = WorkerChannel(driver.fd, driver.geometry, rank, driver.bells[rank], driver.bell)

        def run(name: str, args: object = (), kwargs: object = None) -> Reply:
            if name == STAY.decode():
                self.inside.set()
                assert self.leave.wait(30)
                self.leave.clear()
            self.ran[rank].append(name)
            return DONE

        assert [] == list(end.requests(run, run, ()))

    def send(self, name: bytes, *ranks: int) -> bool:
        """A request. Whether there was room."""
        self._calls += 1
        return self.driver.publish(self._calls, name, NOTHING, ranks, (), AWAY if name == STAY else 0)

    def go_in(self) -> None:
        """Rank 1 runs a resident call."""
        assert self.send(STAY, 1)
        assert self.inside.wait(30)
        self.inside.clear()

    def close(self) -> None:
        """Ends both ranks."""
        self.leave.set()
        assert eventually(self._exit)
        for thread in self._ranks:
            thread.join(30)
            assert not thread.is_alive()
        self.driver.close()
        del self.driver, self._ranks  # its memory goes with what refers to it

    def _exit(self) -> bool:
        number = self.driver.sent
        self.driver.publish_exit()
        return self.driver.sent > number


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends."""
    both = Ends()
    both.start(0)
    both.start(1)
    yield both
    both.close()


def names(start: int, count: int) -> list[bytes]:
    """Of requests."""
    return [str(number).encode() for number in range(start, start + count)]


def text(sent: list[bytes]) -> list[str]:
    """As ranks see them."""
    return [name.decode() for name in sent]


def test_others_go_on_without_a_rank_that_is_away(ends: Ends) -> None:
    """Many times round the ring; afterwards it runs what it is sent, and nothing else."""
    for start in (0, 100, 200):
        ends.ran = {0: [], 1: []}
        ends.go_in()
        sent = names(start, 3 * SLOTS + 1)
        for name in sent:
            eventually(lambda name=name: ends.send(name, 0))  # type: ignore[misc] # mypy knows no such lambda
        eventually(lambda: text(sent) == ends.ran[0])
        ends.leave.set()
        assert eventually(lambda: ends.send(b"both", 0, 1))
        eventually(lambda: [["both"], ["stay", "both"]] == [ends.ran[0][-1:], ends.ran[1]])


def test_a_rank_is_waited_for_again_from_its_next_request_on(ends: Ends) -> None:
    """Be it still inside: what it is to run must not be written over."""
    ends.go_in()
    for name in names(0, 2 * SLOTS):
        eventually(lambda name=name: ends.send(name, 0))  # type: ignore[misc]
    sent = names(100, SLOTS)
    for name in sent:
        assert eventually(lambda name=name: ends.send(name, 0, 1))  # type: ignore[misc]
    assert not ends.send(b"more", 0)
    ends.leave.set()
    eventually(lambda: ["stay", *text(sent)] == ends.ran[1])
    assert eventually(lambda: ends.send(b"more", 0))


def test_a_rank_is_waited_for_until_it_is_away() -> None:
    """The request that lets it go must not be written over either."""
    ends = Ends()
    ends.start(0)
    sent = [STAY, *names(0, SLOTS - 1)]
    for name in sent:
        assert ends.send(name, int(name == STAY))
    eventually(lambda: text(sent[1:]) == ends.ran[0])
    assert not ends.send(b"more", 0)
    ends.leave.set()
    ends.start(1)
    eventually(lambda: ["stay"] == ends.ran[1])
    assert ends.send(b"more", 0)
    ends.close()


def test_all_ranks_may_be_away(ends: Ends) -> None:
    """Nobody reads, so there is room; each goes on with what comes for it."""
    ends.go_in()
    assert ends.send(STAY, 0)
    assert ends.inside.wait(30)
    ends.leave.set()
    eventually(lambda: not ends.leave.is_set())
    ends.leave.set()
    eventually(lambda: [["stay"], ["stay"]] == [ends.ran[0], ends.ran[1]])
    for rank, name in enumerate(names(0, 2)):
        for _ in range(2 * SLOTS):
            assert eventually(lambda rank=rank, name=name: ends.send(name, rank))  # type: ignore[misc]
    eventually(lambda: [2 * SLOTS + 1] * 2 == [len(ran) for ran in ends.ran.values()])


@pytest.mark.parametrize("at", range(1, 60))
def test_interrupted_while_a_rank_goes_or_comes(ends: Ends, at: int) -> None:
    """Ctrl-C at any point of sending: the request was sent, or was not, and what follows arrives."""

    def send(name: bytes, rank: int) -> bool:
        """Whether it was sent, and the point is passed."""
        before, where = ends.driver.sent, []
        where.append(interrupted(lambda: ends.send(name, rank), at))
        if where != [None]:
            ends.driver.wake_all()  # as who calls `publish` does then
        return ends.driver.sent > before

    ran = ["stay"] if send(STAY, 1) else []
    for name in names(0, 2 * SLOTS):
        eventually(lambda name=name: ends.send(name, 0))  # type: ignore[misc]
    if ran:
        ends.leave.set()
    ran += ["back"] if send(b"back", 1) else []
    for name in names(100, 2 * SLOTS):
        eventually(lambda name=name: ends.send(name, 1))  # type: ignore[misc]
    eventually(lambda: [*ran, *text(names(100, 2 * SLOTS))] == ends.ran[1])
