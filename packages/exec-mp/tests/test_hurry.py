"""Who stands in line for a processor is moved to that of a peer which is about to sleep, and left as free as before."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import exec_core as ec
from exec_core.testing import eventually
from exec_mp import _hurry
from exec_mp._channel import NOTHING
from exec_mp._driver_channel import DriverChannel
from exec_mp._hurry import hurry, scarce
from exec_mp._layout import Geometry
from exec_mp._worker_channel import WorkerChannel

Launch = Callable[..., ec.Executor]
_bind = os.sched_setaffinity  # the real one, in every test
GEOMETRY = Geometry(world_size=3, slots=8, inline_bytes=256, arena_bytes=1 << 24, spin_s=0.0)


class Machine:
    """What processors a thread may use, and who was moved where. Processes and what /proc says of them are real."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.real = min(os.sched_getaffinity(0))
        self.here = os.cpu_count() or 1
        self.free = {self.here, self.here + 1}
        self.moved: list[tuple[int, set[int]]] = []
        self.refuses = False
        patch.setattr(os, "sched_getaffinity", lambda tid: set(self.free))
        patch.setattr(os, "sched_setaffinity", self._move)
        patch.setattr(_hurry, "processor", lambda: self.here)

    def _move(self, tid: int, mask: set[int]) -> None:
        if self.refuses:
            raise PermissionError(1, "Operation not permitted")
        self.moved.append((tid, set(mask)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One whose processors have numbers that no real one has here."""
    return Machine(monkeypatch)


def process(code: str) -> Iterator[int]:
    """The pid of an interpreter that runs ``code`` after it has said so."""
    with subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{code}"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
        child.kill()


@pytest.fixture
def busy() -> Iterator[int]:
    """A process that computes, and so has a processor or stands in line for one."""
    yield from process("while True: pass")


@pytest.fixture
def asleep() -> Iterator[int]:
    """A process that waits for something else than a processor."""
    pids = process("import time; time.sleep(1000)")
    pid = next(pids)
    eventually(lambda: state(pid) == "S")
    yield pid
    next(pids, None)


def state(pid: int) -> str:
    """One letter, see proc(5)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(") ")[2][0]


def test_who_stands_in_line_is_moved_and_left_free(machine: Machine, busy: int) -> None:
    """First here, then wherever it could be before; what it could is told before anything is done."""
    told: list[tuple[set[int], int]] = []

    def waits(free: set[int]) -> bool:
        told.append((free, len(machine.moved)))
        return True

    assert hurry(busy, busy, waits)
    assert [(busy, {machine.here}), (busy, machine.free)] == machine.moved
    assert [(machine.free, 0)] == told


def waits(_free: set[int]) -> bool:
    """It does."""
    return True


def test_who_sleeps_is_left_alone(machine: Machine, asleep: int) -> None:
    """It does not want a processor."""
    assert not hurry(asleep, asleep, waits)
    assert [] == machine.moved


def test_who_has_gone_on_is_left_alone(machine: Machine, busy: int) -> None:
    """It has what it waited for, and does what must not be bound to anything."""
    assert not hurry(busy, busy, lambda _free: False)
    assert [] == machine.moved


def test_who_is_bound_stays_that(machine: Machine, busy: int) -> None:
    """It may use one processor only, for now or for good."""
    machine.free = {machine.here}
    assert not hurry(busy, busy, waits)
    assert [] == machine.moved


def test_who_is_here_gets_its_turn(machine: Machine, busy: int) -> None:
    """The processor is given up in a moment anyway."""
    _bind(busy, {machine.real})
    machine.here, machine.free = machine.real, {machine.real, machine.real + 1}
    assert not hurry(busy, busy, waits)
    assert [] == machine.moved


def test_who_may_not_come_here_is_left_alone(machine: Machine, busy: int) -> None:
    """Somebody has bound it to other processors."""
    machine.free = {machine.here + 1, machine.here + 2}
    assert not hurry(busy, busy, waits)
    assert [] == machine.moved


def test_who_is_gone_is_not_missed(machine: Machine) -> None:
    """A thread that has ended, of a process that lives."""
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    eventually(lambda: not os.path.exists(f"/proc/{os.getpid()}/task/{thread.native_id}"))
    assert not hurry(os.getpid(), thread.native_id, waits)
    assert not hurry(os.getpid(), 1, waits)  # a thread of another process
    assert [] == machine.moved


def test_what_the_system_refuses_is_left(machine: Machine, busy: int) -> None:
    """No right to move it, or no way to note what to undo."""
    machine.refuses = True
    assert not hurry(busy, busy, waits)
    machine.refuses = False

    def too_large(_free: set[int]) -> bool:
        raise OverflowError

    assert not hurry(busy, busy, too_large)
    assert [] == machine.moved


@pytest.mark.parametrize(("processors", "expected"), [(1, False), (2, True), (3, True), (4, False)])
def test_processors_are_scarce_where_there_are_hardly_more_than_processes(
    monkeypatch: pytest.MonkeyPatch, processors: int, expected: bool
) -> None:
    """With one there is nowhere to go, with many the scheduler finds one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    assert expected == scarce(2)


# What both sides tell each other


@contextlib.contextmanager
def driver_end() -> Iterator[DriverChannel]:
    """The driver's end for three ranks, of which the first is in the driver's own process."""
    channel = DriverChannel(GEOMETRY, (1, 2))
    yield channel
    channel.close()


def worker(driver: DriverChannel, rank: int) -> WorkerChannel:
    """The end of one rank."""
    return WorkerChannel(driver.fd, driver.geometry, rank, driver.bells[rank], driver.bell)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few processors, whatever there are here."""
    monkeypatch.setattr(_hurry, "scarce", lambda world_size: True)


@pytest.mark.usefixtures("few")
def test_a_rank_is_late_that_waits_and_has_not_read() -> None:
    """Neither one that has begun, nor one that does not wait or not yet, nor one that is in this very process."""
    with driver_end() as driver:
        lines = [worker(driver, rank).line for rank in (1, 2)]
        driver.publish(7, b"load", NOTHING, (1, 2), ())
        assert [] == driver.line.late((0, 1, 2), driver.sent)  # they start
        for line in lines:
            line.waits()
        assert [1, 2] == driver.line.late((0, 1, 2), driver.sent)
        assert [2] == driver.line.late((2,), driver.sent)
        lines[1].goes_on()
        assert [1] == driver.line.late((1, 2), driver.sent)
        begun = worker(driver, 1).requests(lambda _: ec.messages.Reply(1), set())
        next(begun)
        assert [] == driver.line.late((1, 2), driver.sent)


@pytest.mark.usefixtures("few")
def test_one_rank_watches_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that has a process of its own, and only while somebody waits."""
    with driver_end() as driver:
        hurried: list[tuple[int, int]] = []
        monkeypatch.setattr(_hurry, "hurry", lambda pid, tid, waits: hurried.append((pid, tid)))
        ranks = [worker(driver, 1), worker(driver, 2)]

        def look() -> list[bool]:
            for rank in ranks:
                rank.line.hurry_driver()
            return [rank.line.is_watched() for rank in ranks]

        assert [False, False] == look()
        driver.line.waits(4711)
        assert [True, False] == look()
        driver.line.goes_on(4711)
        assert [False, False] == look()
        assert [(os.getpid(), 4711)] == hurried


@pytest.mark.usefixtures("few")
def test_who_has_gone_on_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mover looks once more after it has said what it is going to do."""
    answers: list[bool] = []
    monkeypatch.setattr(_hurry, "hurry", lambda pid, tid, waits: answers.append(waits({3, 70})))
    with driver_end() as driver:
        rank = worker(driver, 1).line
        rank.waits()
        driver.line.waits(4711)
        driver.line.hurry(1, 4711)
        rank.hurry_driver()
        rank.goes_on()
        driver.line.hurry(1, 4711)
        assert [True, True, False] == answers

        def late(_pid: int, tid: int, waits: Callable[[set[int]], bool]) -> None:
            driver.line.goes_on(tid)
            answers.append(waits({3, 70}))

        monkeypatch.setattr(_hurry, "hurry", late)
        rank.hurry_driver()
        assert [True, True, False, False] == answers


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("moved", ["driver", "rank"])
def test_who_is_being_moved_waits_until_that_is_over(monkeypatch: pytest.MonkeyPatch, moved: str) -> None:
    """It must not get on with its work while it is bound to one processor."""
    with driver_end() as driver:
        rank = worker(driver, 1).line
        moving, done = threading.Event(), threading.Event()

        def hurry(_pid: int, _tid: int, waits: Callable[[set[int]], bool]) -> None:
            assert waits({3, 70})
            moving.set()
            assert done.wait(30)

        monkeypatch.setattr(_hurry, "hurry", hurry)
        monkeypatch.setattr(_hurry, "_MOVED_WITHIN_S", 30)
        rank.waits()
        driver.line.waits(4711)
        mover = threading.Thread(target=rank.hurry_driver if moved == "driver" else lambda: driver.line.hurry(1, 1))
        mover.start()
        assert moving.wait(30)
        waiter = threading.Thread(target=(lambda: driver.line.goes_on(4711)) if moved == "driver" else rank.goes_on)
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive()
        done.set()
        waiter.join(30)
        mover.join(30)
        assert not waiter.is_alive()


@pytest.mark.usefixtures("few")
def test_a_move_that_its_rank_did_not_end_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's thread may use again what it could before, also where processors have high numbers."""
    with driver_end() as driver:
        free = {3, 70, 600}
        rank = worker(driver, 1).line
        driver.line.waits(4711)
        rank._still_waits(os.getpid(), 4711, free)  # and it is killed
        undone: list[tuple[int, set[int]]] = []
        monkeypatch.setattr(os, "sched_setaffinity", lambda tid, mask: undone.append((tid, mask)))
        driver.line.goes_on(4711)
        assert [(4711, free)] == undone


# With workers


@pytest.mark.usefixtures("few")
def test_the_driver_hurries_ranks_that_have_not_begun(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is stopped, once in a call. The other one may be slow as well."""
    executor = launch()
    pids = [worker.pid for worker in executor.workers]
    executor.collective_rpc(lambda worker: worker.context.rank)
    hurried: list[tuple[int, int]] = []
    channel = executor._group._channel  # type: ignore[union-attr] # ours
    monkeypatch.setattr(channel.line, "hurry", lambda rank, pid: hurried.append((rank, pid)))
    eventually(lambda: [0, 1] == channel.line.late((0, 1), channel.sent + 1))  # both wait
    os.kill(pids[1], signal.SIGSTOP)
    eventually(lambda: state(pids[1]) == "T")
    threading.Timer(0.1, os.kill, (pids[1], signal.SIGCONT)).start()
    executor.collective_rpc(lambda worker: worker.context.rank)
    assert 1 == hurried.count((1, pids[1]))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("late", [[], [1]])
def test_nobody_is_looked_after_when_all_have_begun(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, late: list[int]
) -> None:
    """Waking up for a look costs processor time: not in the steps in which the ranks were there before it."""
    executor = launch()
    channel = executor._group._channel  # type: ignore[union-attr] # ours
    sleep, slept = channel.sleep, []

    def note(timeout_s: float) -> bool:
        slept.append(timeout_s)
        return bool(sleep(timeout_s))

    monkeypatch.setattr(channel, "sleep", note)
    monkeypatch.setattr(channel.line, "late", lambda _ranks, _sent: late)
    monkeypatch.setattr(channel.line, "hurry", lambda _rank, _pid: None)
    executor.collective_rpc(lambda _worker: time.sleep(0.05))
    assert bool(late) == (_hurry.REQUEST_LATE_S in slept)


def test_a_rank_hurries_the_thread_that_waits(launch: Launch) -> None:
    """Rank 0 has answered, and nobody takes it at once, since rank 1 is not ready."""

    def watch(_worker: Any) -> None:
        import gc

        from exec_mp import _hurry, _worker_channel

        (channel,) = (one for one in gc.get_objects() if isinstance(one, _worker_channel.WorkerChannel))
        channel.line._scarce, hurried = True, []
        _hurry.hurry = lambda pid, tid, _waits: hurried.append((pid, tid))  # type: ignore[assignment,return-value] # for the test
        channel.hurried = hurried  # type: ignore[attr-defined] # to find it again

    def nap(worker: Any) -> None:
        time.sleep(0.01 * worker.context.rank)

    def tell(_worker: Any) -> Any:
        import gc

        from exec_mp import _worker_channel

        channel: Any = next(one for one in gc.get_objects() if isinstance(one, _worker_channel.WorkerChannel))
        return channel.hurried

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_hurry, "scarce", lambda world_size: True)
        executor = launch()
    executor.collective_rpc(watch)
    for _ in range(20):
        executor.collective_rpc(nap)
    of_0, of_1 = executor.collective_rpc(tell)
    assert {(os.getpid(), threading.get_native_id())} == set(of_0)
    assert [] == of_1


def test_a_rank_that_dies_while_it_moves_the_driver_leaves_it_free(launch: Launch) -> None:
    """Killed between the two steps of a move, with a thread of the driver bound to one processor."""

    def arm(worker: Any) -> None:
        import gc

        from exec_mp import _hurry, _worker_channel

        (channel,) = (one for one in gc.get_objects() if isinstance(one, _worker_channel.WorkerChannel))
        channel.line._scarce = worker.context.rank == 0

        def dies(_pid: int, tid: int, waits: Any) -> bool:
            allowed = os.sched_getaffinity(tid)
            if waits(allowed):
                os.sched_setaffinity(tid, {max(allowed)})
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        _hurry.hurry = dies  # type: ignore[assignment] # other names of arguments

    def nap(worker: Any) -> None:
        time.sleep(0.01 * worker.context.rank)

    before = os.sched_getaffinity(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_hurry, "scarce", lambda world_size: True)
        executor = launch()
    executor.collective_rpc(arm)
    with pytest.raises((ec.WorkerDiedError, ec.ExecutorFailedError), match="rank 0"):  # in a call, or just after it
        for _ in range(100):
            executor.collective_rpc(nap)
    assert before == os.sched_getaffinity(0)


def test_nobody_is_bound_while_it_works(launch: Launch, busy: int) -> None:
    """With another program in the way, so that somebody has to be moved now and then: what is started then would stay bound."""
    _bind(busy, {min(os.sched_getaffinity(0))})
    free = os.sched_getaffinity(0)
    executor = launch()

    def step(_worker: Any) -> Any:
        began = os.sched_getaffinity(0)
        time.sleep(0.002)
        return began, os.sched_getaffinity(0)

    for _ in range(100):
        assert [(free, free)] * 2 == executor.collective_rpc(step)
        assert free == os.sched_getaffinity(0)
