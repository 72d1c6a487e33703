"""Meeting, talking and leaving between threads of one process, with real sockets."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from exec_core import WorkerStartupError
from exec_torchrun import _sockets, _store
from exec_torchrun._env import LauncherEnv
from exec_torchrun._frames import Connection, Frame, Kind
from exec_torchrun._hub import Hub
from exec_torchrun._link import Describe, Link, Member, no_call
from exec_torchrun._meeting import Meeting, Report, meet
from exec_torchrun._page import HAS_PAGE, SPIN_S, Page
from exec_torchrun._sockets import Address, Patience

Run = Callable[..., Future[Any]]


@pytest.fixture
def run() -> Iterator[Run]:
    """``run(function, *args)`` on a thread of its own."""
    with ThreadPoolExecutor(16) as pool:
        yield pool.submit


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launcher's store, in this process."""
    store = dist.HashStore()  # type: ignore[attr-defined] # public
    monkeypatch.setattr(_store, "_find", lambda env, patience: store)
    return store


def env(rank: int, world_size: int = 4, replica_size: int = 2, one_machine: bool = True) -> LauncherEnv:
    """The place of a rank."""
    return LauncherEnv(rank, world_size, rank, world_size if one_machine else None, "localhost", 1, replica_size)


def meet_as(place: LauncherEnv, name: str = "0-0", seconds: float = 10.0, patience: Patience | None = None) -> Meeting:
    """One rank's part in a meeting."""
    patience = patience or Patience(time.monotonic() + seconds)
    return meet(place, name, Report(place.rank, 1000 + place.rank, "config"), patience, 1.0)


@pytest.fixture(params=["page", "sockets"])
def links(request: pytest.FixtureRequest, run: Run) -> Iterator[list[Link]]:
    """Three ranks of a replica, the hub first, of one machine or not."""
    pairs = [socket.socketpair() for _ in range(2)]
    pages: list[Page | None] = [None] * 3
    if request.param == "page":
        fd = Page.create(3)
        pages = [Page(fd, 3, index) for index in range(3)]
        os.close(fd)
    connections = {index: Connection(pair[0]) for index, pair in enumerate(pairs, 1)}
    hub = Hub(connections, {1: 11, 2: 12}, 1.0, pages[0])
    members = [Member(index, Connection(pair[1]), 10, pages[index]) for index, pair in enumerate(pairs, 1)]
    yield [hub, *members]
    for member in members:
        member.close()
    hub.close()


def begin(turn: int, digest: bytes = b"same", wait_s: float = 5.0) -> Frame:
    """A rank wants to run a call."""
    return Frame(Kind.BEGIN, turn, ((0, b"call"),), digest.ljust(16), wait_s, limit_s=5.0)


def meets(link: Link, word: Frame, describe: Describe = no_call) -> Frame:
    """What a rank is told that says ``word``: by the page, if that is enough."""
    digest, value = (word.digest, None) if word.kind is Kind.BEGIN else (None, word.parts[0][1] if word.parts else None)
    if not link.agree(word.turn, time.monotonic() + word.limit_s, digest, value, (1, "call") if digest else None):
        return link.exchange(word, describe)
    return Frame(Kind.GO) if digest is not None else Frame(Kind.DONE, parts=link.values())


def exchange_all(run: Run, links: Sequence[Link], words: Sequence[Frame]) -> list[Kind]:
    """What each rank is told when all say their words."""
    futures = [
        run(meets, link, word, lambda: ("mine", b"mine".ljust(16))) for link, word in zip(links, words, strict=True)
    ]
    return [future.result(10).kind for future in futures]


@pytest.mark.parametrize("one_machine", [True, False])
def test_all_ranks_meet(run: Run, store: Any, one_machine: bool) -> None:
    """Every rank gets the reports of all and a link to its own replica: memory that they share, or any interface."""
    meetings = [future.result(20) for future in [run(meet_as, env(rank, one_machine=one_machine)) for rank in range(4)]]
    try:
        assert {meeting.init_method for meeting in meetings} == {meetings[0].init_method}
        for meeting in meetings:
            assert [(rank, 1000 + rank) for rank in range(4)] == [(r.rank, r.pid) for r in meeting.reports]
        for replica in (meetings[:2], meetings[2:]):
            links = [meeting.link for meeting in replica if isinstance(meeting.link, Hub | Member)]
            assert [one_machine and HAS_PAGE] * 2 == [link.has_page for link in links]
            assert [Kind.GO] * 2 == exchange_all(run, links, [begin(0)] * 2)
    finally:
        for meeting in meetings:
            if meeting.link is not None:
                meeting.link.close()


def test_what_an_earlier_attempt_left_is_not_believed(run: Run, store: Any) -> None:
    """An address in the store where nobody listens any more is read again until rank 0 has overwritten it."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        places = (gone.getsockname(), b"\0nobody is here")
    store.set("exec-torchrun/0-0", pickle.dumps(Address(places, b"old")))
    visitor = run(meet_as, env(1, 2, 1))
    host = run(meet_as, env(0, 2, 1))

    assert host.result(20).init_method == visitor.result(20).init_method


def test_a_rank_that_does_not_come_is_named(run: Run, store: Any) -> None:
    """After the start's time those who came are told who did not."""
    # Rank 0 says who is missing when its own time is over: the others still listen then, however late it gets to run.
    futures = [run(meet_as, env(rank, 4, 2), seconds=10.0 if rank else 1.0) for rank in (0, 1, 3)]
    for future in futures:
        with pytest.raises(WorkerStartupError, match="rank 2 failed in launch: has not come"):
            future.result(20)


def test_a_rank_that_comes_twice_is_named(run: Run, store: Any) -> None:
    """Two processes with the same RANK are told apart from one that is missing."""
    futures = [run(meet_as, env(rank, 3, 1), seconds=2.0) for rank in (0, 1, 1)]
    with pytest.raises(WorkerStartupError, match="rank 1 failed in launch: has come twice"):
        futures[0].result(20)
    for future in futures[1:]:
        with pytest.raises(WorkerStartupError):
            future.result(20)


def test_a_first_rank_that_gives_up_tells_those_who_came(run: Run, store: Any) -> None:
    """They do not wait for longer than it does."""
    patience = Patience(time.monotonic() + 30)
    host = run(meet_as, env(0, 3, 1), patience=patience)
    store.wait(["exec-torchrun/0-0"], datetime.timedelta(seconds=10))
    visitor = _sockets.try_connect(
        pickle.loads(store.get("exec-torchrun/0-0")), 1, pickle.dumps(Report(1, 1001, "config"))
    )
    assert visitor is not None
    patience.give_up()
    told = _sockets.receive(visitor, Patience(time.monotonic() + 10))
    visitor.close()

    assert told is not None
    problem, _, _ = pickle.loads(told.parts[0][1])
    assert (0, "was shut down while the ranks were meeting") == problem
    with pytest.raises(WorkerStartupError, match="rank 0 failed in launch: was shut down"):
        host.result(10)


def test_strangers_are_not_let_in(run: Run, store: Any) -> None:
    """A connection that does not know the secret, or says nothing of use, is closed, and the meeting goes on."""
    host = run(meet_as, env(0, 2, 1, one_machine=False))
    store.wait(["exec-torchrun/0-0"], datetime.timedelta(seconds=10))
    address = pickle.loads(store.get("exec-torchrun/0-0"))
    for hello in (Frame(Kind.HELLO, 1, ((1, b"wrong"), (1, b""))).packed(), b"GET / HTTP/1.1\r\n" * 10, b""):
        with socket.create_connection(address.places[-1]) as stranger:
            stranger.sendall(hello)
            stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert not stranger.recv(1)
    visitor = run(meet_as, env(1, 2, 1, one_machine=False))
    assert visitor.result(20).init_method == host.result(20).init_method


def test_a_large_value_goes_round(run: Run, links: list[Link]) -> None:
    """Values of many megabytes from all ranks at once come back to all of them."""
    assert [Kind.GO] * 3 == exchange_all(run, links, [begin(0)] * 3)
    words = [Frame(Kind.END, 1, ((index, bytes([index]) * (8 << 20)),), limit_s=10.0) for index in range(3)]
    futures = [run(meets, link, word) for link, word in zip(links, words, strict=True)]
    for future in futures:
        assert [(index, bytes([index]) * (8 << 20)) for index in range(3)] == list(future.result(20).parts)


def test_words_and_values_reach_all_whenever_they_come(run: Run, links: list[Link]) -> None:
    """Ranks come at random moments, within the time that they wait by yielding or beyond: all get the verdict and the values."""

    def one_rank(index: int) -> None:
        moments = random.Random(index)  # noqa: S311 # no secret
        for number in range(200):
            time.sleep(moments.choice([0.0, 2 * SPIN_S * moments.random()]))  # what is tested: any moment
            assert Kind.GO is meets(links[index], begin(2 * number)).kind
            own = f"{index} {number}".encode()
            done = meets(
                links[index], Frame(Kind.END, 2 * number + 1, ((index, own),) if number % 3 else (), limit_s=9.0)
            )
            expected = tuple((rank, f"{rank} {number}".encode()) for rank in range(3)) if number % 3 else ()
            assert (Kind.DONE, expected) == (done.kind, done.parts)

    for future in [run(one_rank, index) for index in range(3)]:
        future.result(60)


def test_the_hub_answers_while_its_rank_is_away(run: Run, links: list[Link]) -> None:
    """Its thread tells the others that its rank has not come, though that rank says nothing at all."""
    futures = [run(meets, link, begin(0, wait_s=0.3), lambda: ("mine", b"mine".ljust(16))) for link in links[1:]]
    for future in futures:
        told = future.result(10)
        assert (Kind.DIVERGED, [b"no call, its last was none", b"mine", b"mine"]) == (
            told.kind, [text for _, text in told.parts]
        )  # fmt: skip
    assert Kind.DIVERGED is meets(links[0], begin(0)).kind
    assert [Kind.GO] * 3 == exchange_all(run, links, [begin(1)] * 3)


def test_a_connection_that_ends_is_a_death(run: Run, links: list[Link]) -> None:
    """The others are told which, whether they wait already or come later."""
    waiting = run(meets, links[0], begin(0))
    links[2].close()

    assert (Kind.DIED, ((2, b"12"),)) == (waiting.result(10).kind, waiting.result(10).parts)
    assert Kind.DIED is meets(links[1], begin(0)).kind


def test_the_hub_that_ends_is_a_death(run: Run, links: list[Link]) -> None:
    """So it is for the others when it is the hub that goes."""
    waiting = run(meets, links[1], begin(0))
    links[0].close()

    assert (Kind.DIED, ((0, b"10"),)) == (waiting.result(10).kind, waiting.result(10).parts)
    assert Kind.DIED is meets(links[2], begin(0)).kind


def test_all_leave_together(run: Run, links: list[Link]) -> None:
    """Nobody waits for longer than the last one takes."""
    deadline = time.monotonic() + 10
    futures = [run(link.leave, 0, deadline) for link in links]

    assert [Kind.BYE] * 3 == [future.result(10).kind for future in futures]


def test_leaving_alone_does_not_wait_for_ever(run: Run, links: list[Link]) -> None:
    """A rank leaves at its deadline, whoever is still there; who comes after the hub is told that it has left."""
    started = time.monotonic()
    assert links[1].leave(0, started + 0.2) is None
    assert links[0].leave(0, started + 0.4) is None
    assert 0.4 <= time.monotonic() - started < 2.0
    links[0].close()
    told = meets(links[2], begin(0))

    assert (Kind.LEFT, [b"shutdown()", b"shutdown()"]) == (told.kind, [text for _, text in told.parts[:2]])


def test_frames_arrive_whole_however_they_are_cut() -> None:
    """Byte by byte, or several at once."""
    ours, theirs = socket.socketpair()
    connection = Connection(theirs)
    frames = [begin(3), Frame(Kind.END, 4, ((1, b"x" * 5), (2, b"")))]
    try:
        for byte in b"".join(frame.packed() for frame in frames):
            ours.sendall(struct.pack("B", byte))
            connection.fill()
        assert frames == [connection.pop(), connection.pop()]
        assert connection.pop() is None
        assert connection.receive(time.monotonic() + 0.05) is None
        assert not connection.ended
    finally:
        ours.close()
        assert connection.receive(time.monotonic() + 5) is None
        assert connection.ended
        connection.close()
