"""The turn of a worker in this process: one at a time, in order, and nobody is forgotten."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from exec_core.inline import InlineWorker, Job
from exec_core.messages import Reply, Request
from exec_core.wrapper import WorkerWrapper

FAR = float("inf")


class Recorder(WorkerWrapper):
    """Runs nothing; remembers in which order it was asked, and whether it was asked by two at once."""

    def __init__(self) -> None:
        super().__init__(0)
        self.order: list[str] = []
        self.overlaps = 0
        self._inside = 0
        self.while_running: Callable[[str], None] = lambda name: None

    def execute(self, request: Request) -> Reply:
        self._inside += 1
        self.overlaps += self._inside != 1
        self.order.append(request.name)
        self.while_running(request.name)
        self._inside -= 1
        return Reply(request.name)


@pytest.fixture
def recorder() -> Recorder:
    """What the worker runs."""
    return Recorder()


@pytest.fixture
def worker(recorder: Recorder) -> Iterator[InlineWorker]:
    """One that must be free in the end."""
    worker = InlineWorker(recorder)
    yield worker
    assert worker.close(time.monotonic() + 10)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def ignore(reply: Reply) -> None:
    """Nobody waits."""


def blocking(worker: InlineWorker, name: str) -> Any:
    """One call as `InProcessGroup` makes it."""
    request = Request(name)
    reply = worker.run_now(request)
    if reply is None:
        job = Job(request)
        worker.enqueue(job)
        reply = worker.run(job, time.monotonic() + 20, late=ignore)
    return None if reply is None else reply.value


def later(worker: InlineWorker, name: str, replies: list[Any]) -> None:
    """One whose reply comes by itself."""
    worker.enqueue(Job(Request(name), done=lambda reply: replies.append(reply.value)))


@pytest.mark.usefixtures("hasty")
def test_no_turn_is_lost(worker: InlineWorker, recorder: Recorder) -> None:
    """However giving up the turn and waiting for it fall together, every call runs once, alone, and in its thread's order."""
    threads, count = 6, 400
    wrong: list[Any] = []
    replies: dict[int, list[Any]] = {thread: [] for thread in range(threads)}

    def caller(thread: int) -> None:
        for number in range(count):
            name = f"{thread}-{number}"
            if (number + thread) % 3 == 0:
                later(worker, name, replies[thread])
            elif (found := blocking(worker, name)) != name:
                wrong.append((name, found))

    callers = [threading.Thread(target=caller, args=(thread,), daemon=True) for thread in range(threads)]
    for one in callers:
        one.start()
    for one in callers:
        one.join(60)
    assert blocking(worker, "last") == "last"

    assert not wrong
    assert recorder.overlaps == 0
    assert "last" == recorder.order[-1]
    for thread in range(threads):
        names = [f"{thread}-{number}" for number in range(count)]
        assert names == [name for name in recorder.order if name.startswith(f"{thread}-")]
        assert [name for number, name in enumerate(names) if (number + thread) % 3 == 0] == replies[thread]


def wait_for(found: list[Any], count: int) -> None:
    """Until there are so many."""
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.001)


class Between(dict[str, object]):
    """A turn that is given up by its holder just after another has asked for it in vain."""

    def __init__(self, give_up: Callable[[], None]) -> None:
        super().__init__()
        self._give_up = give_up

    def setdefault(self, key: str, default: object = None) -> object:
        found = super().setdefault(key, default)
        if found is not default:
            self._give_up()
        return found


def test_turn_given_up_before_the_queue_is_joined(worker: InlineWorker, recorder: Recorder) -> None:
    """Who asked in vain, and then found nobody to wait for, does not wait."""
    first = Job(Request("first"))
    worker._turn = Between(lambda: worker._hand_on(first))
    worker.enqueue(first)
    replies: list[Any] = []

    later(worker, "second", replies)

    wait_for(replies, 1)
    assert ["second"] == replies == recorder.order


def test_turn_is_handed_to_who_came_meanwhile(worker: InlineWorker, recorder: Recorder) -> None:
    """Whoever came while a call ran gets the turn without another call's help."""
    replies: list[Any] = []
    recorder.while_running = lambda name: later(worker, "second", replies) if name == "first" else None

    assert "first" == blocking(worker, "first")

    wait_for(replies, 1)
    assert ["first", "second"] == recorder.order


@pytest.mark.parametrize("call", [blocking, lambda worker, name: later(worker, name, [])], ids=["blocking", "later"])
def test_nobody_overtakes_who_waits(
    worker: InlineWorker, recorder: Recorder, call: Callable[[InlineWorker, str], Any]
) -> None:
    """In the moment in which the turn is free and has not yet been given to who waits for it, nobody else takes it."""
    replies: list[Any] = []
    worker.enqueue(Job(Request("first")))
    later(worker, "second", replies)
    worker._turn.clear()

    call(worker, "third")

    wait_for(recorder.order, 2)
    assert ["second", "third"] == recorder.order


def test_nothing_runs_once_it_is_closed(recorder: Recorder) -> None:
    """Neither at once nor in turn."""
    worker = InlineWorker(recorder)
    assert worker.close(time.monotonic() + 10)

    assert blocking(worker, "late") is None
    assert worker.close(time.monotonic() + 10)  # nobody has kept the turn
    assert [] == recorder.order


def test_dropped_although_it_had_been_given_the_turn(recorder: Recorder) -> None:
    """A close finds a job whose being handed the turn has just been interrupted: it is dropped, and the turn is free."""
    worker = InlineWorker(recorder)
    first, second = Job(Request("first")), Job(Request("second"))
    worker.enqueue(first)
    worker.enqueue(second)

    class Interrupted(dict[str, object]):
        def setdefault(self, key: str, default: object = None) -> object:
            super().setdefault(key, default)
            raise KeyboardInterrupt

    worker._turn = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        worker._give_turn()

    assert worker.close(time.monotonic() + 10)
    assert second.dropped
    assert worker.run(second, FAR, late=ignore) is None
