"""The states of an executor, their moves, and who hears of a failure: without an executor."""

import itertools
import os
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from exec_core import ExecutorClosedError, ExecutorFailedError, State, WorkerDiedError
from exec_core.lifecycle import Lifecycle

DIED = WorkerDiedError(1, 4711, signal_name="SIGKILL")
ALLOWED = {
    (State.STARTING, State.READY), (State.STARTING, State.FAILED), (State.STARTING, State.CLOSING),
    (State.READY, State.FAILED), (State.READY, State.CLOSING),
    (State.FAILED, State.STARTING), (State.FAILED, State.CLOSING),
    (State.CLOSING, State.CLOSED),
}  # fmt: skip


class Silent:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def exception(self, event: str, **facts: Any) -> None:
        """Keeps the event."""
        self.events.append(event)


def at(state: State) -> Lifecycle:
    """A lifecycle that has come to ``state`` by legal moves."""
    ways: dict[State, list[State]] = {
        State.STARTING: [],
        State.READY: [State.READY],
        State.FAILED: [State.READY, State.FAILED],
        State.CLOSING: [State.READY, State.CLOSING],
        State.CLOSED: [State.READY, State.CLOSING, State.CLOSED],
    }
    lifecycle = Lifecycle()
    for step in ways[state]:
        assert lifecycle.move(step, DIED)
    return lifecycle


@pytest.mark.parametrize(("before", "to"), list(itertools.product(State, State)))
def test_moves(before: State, to: State) -> None:
    """Exactly the drawn moves are made; any other is refused and changes nothing."""
    lifecycle = at(before)

    assert ((before, to) in ALLOWED) == lifecycle.move(to, DIED)
    assert (to if (before, to) in ALLOWED else before) is lifecycle.state


def test_generation_counts_restarts() -> None:
    """The first start is generation 0, each restart one more."""
    lifecycle = at(State.FAILED)
    assert 0 == lifecycle.generation
    lifecycle.move(State.STARTING)
    assert 1 == lifecycle.generation
    assert lifecycle.failure is None


def test_ready_is_open() -> None:
    """Calls may be sent in state READY only."""
    at(State.READY).check_open("load")
    for state in set(State) - {State.READY, State.FAILED}:
        with pytest.raises(ExecutorClosedError, match=rf"'load': the executor is {state.value}"):
            at(state).check_open("load")


def test_failed_says_why() -> None:
    """A call after a failure raises that it has failed, with the failure as cause."""
    with pytest.raises(ExecutorFailedError, match="'load' was not sent: the executor has failed .*SIGKILL") as caught:
        at(State.FAILED).check_open("load")

    assert caught.value.__cause__ is DIED


def test_other_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child has only a copy, closed from the start, and says whose it is."""
    lifecycle = at(State.CLOSED)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ExecutorClosedError, match="forked child"):
        lifecycle.check_open(None)


def test_death_while_starting_keeps_it_from_being_ready() -> None:
    """A worker that dies during the start dooms it."""
    lifecycle = Lifecycle()

    assert not lifecycle.fail(DIED)
    assert not lifecycle.move(State.READY)
    assert lifecycle.doomed is DIED


def test_only_one_failure_counts() -> None:
    """The first death fails the executor, a second one changes nothing."""
    lifecycle = at(State.READY)

    assert [True, False] == [lifecycle.fail(DIED), lifecycle.fail(WorkerDiedError(2, 4712))]
    assert lifecycle.failure is DIED


def heard(lifecycle: Lifecycle) -> Future[tuple[BaseException, str]]:
    """What the next callback of ``lifecycle`` is told, and on which thread."""
    future: Future[tuple[BaseException, str]] = Future()
    lifecycle.register(lambda error: future.set_result((error, threading.current_thread().name)), Silent())
    return future


def test_callback_runs_on_a_thread_of_its_own() -> None:
    """The callback gets the failure, on a thread of its own."""
    lifecycle = at(State.READY)
    future = heard(lifecycle)
    lifecycle.fail(DIED)
    assert not future.done()
    lifecycle.notify(DIED, Silent(), lambda: None)

    assert (DIED, "exec-failure") == future.result(30)


def test_late_callback_hears_at_once() -> None:
    """A callback that comes after the failure is told of it at once."""
    lifecycle, told = at(State.READY), threading.Event()
    lifecycle.fail(DIED)
    lifecycle.notify(DIED, Silent(), told.set)
    assert told.wait(30)

    assert DIED is heard(lifecycle).result(30)[0]


def test_callback_that_raises_is_logged() -> None:
    """A callback that raises keeps neither the others nor what comes after from running."""
    lifecycle, log, after = at(State.READY), Silent(), threading.Event()

    def broken(error: BaseException) -> None:
        raise ZeroDivisionError

    lifecycle.register(broken, log)
    future = heard(lifecycle)
    lifecycle.fail(DIED)
    lifecycle.notify(DIED, log, after.set)

    assert DIED is future.result(30)[0]
    assert after.wait(30)
    assert ["failure callback raised"] == log.events


def test_every_callback_runs_once_whenever_it_comes() -> None:
    """Callbacks that register while the failure happens each run exactly once."""
    for _ in range(50):
        lifecycle, told = at(State.READY), threading.Event()
        counts = [0] * 8
        together = threading.Barrier(9)
        done = threading.Semaphore(0)

        def register(number: int) -> None:
            def called(error: BaseException) -> None:
                counts[number] += 1
                done.release()

            together.wait(30)
            lifecycle.register(called, Silent())

        threads = [threading.Thread(target=register, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        together.wait(30)
        lifecycle.fail(DIED)
        lifecycle.notify(DIED, Silent(), told.set)
        for thread in threads:
            thread.join()
        assert told.wait(30)
        assert all(done.acquire(timeout=30) for _ in range(8))
        assert [1] * 8 == counts


def failed_again(told: bool) -> tuple[Lifecycle, list[BaseException], BaseException]:
    """A lifecycle whose restart has failed, what its callback has heard before that, and the second failure."""
    lifecycle, heard_of, after, again = at(State.READY), list[BaseException](), threading.Event(), ValueError("again")
    lifecycle.register(heard_of.append, Silent())
    lifecycle.fail(DIED)
    lifecycle.notify(DIED, Silent(), after.set)
    assert after.wait(30)
    lifecycle.move(State.STARTING)
    lifecycle.move(State.FAILED, again, told)
    return lifecycle, heard_of, again


def test_restart_that_raises_to_its_caller() -> None:
    """A restart whose caller is told of its failure: callbacks are not, but for those that come later."""
    lifecycle, heard_of, again = failed_again(told=True)
    late = heard(lifecycle)
    lifecycle.tell(again, Silent())

    assert again is late.result(30)[0]
    assert [DIED] == heard_of


def test_restart_that_nobody_asked_for() -> None:
    """A restart whose failure is told later: each callback then runs once, also one that has come before that."""
    lifecycle, heard_of, again = failed_again(told=False)
    early = heard(lifecycle)
    assert not early.done()
    for _ in range(2):
        lifecycle.tell(again, Silent())

    assert again is early.result(0)[0]
    assert [DIED, again] == heard_of
    assert again is heard(lifecycle).result(30)[0]


def test_failure_that_is_over_is_not_told() -> None:
    """What is told late is not told when a restart has come first."""
    lifecycle, heard_of, again = failed_again(told=False)
    lifecycle.move(State.STARTING)
    lifecycle.tell(again, Silent())

    assert [DIED] == heard_of


def test_late_callback_that_raises_is_logged() -> None:
    """A callback that comes after the failure and raises is logged, as the others are."""
    lifecycle, told, logged = at(State.READY), threading.Event(), threading.Event()

    class Waking(Silent):
        def exception(self, event: str, **facts: Any) -> None:
            super().exception(event, **facts)
            logged.set()

    lifecycle.fail(DIED)
    lifecycle.notify(DIED, Silent(), told.set)
    assert told.wait(30)
    log = Waking()
    lifecycle.register(lambda error: 1 // 0, log)

    assert logged.wait(30)
    assert ["failure callback raised"] == log.events
