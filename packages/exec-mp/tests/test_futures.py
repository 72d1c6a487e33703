"""Who waits on a future receives its answer, whichever thread that is, and nobody else is kept waiting by it."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import exec_core as ec
from exec_core.testing import Gate, eventually, faults, workers
from exec_core.testing.interrupts import interrupted

Launch = Callable[..., ec.Executor]


def _thread(_: list[Any]) -> str:
    return threading.current_thread().name


def _submit(executor: ec.Executor, seconds: float = 0.02, **kwargs: Any) -> Future[Any]:
    """A call whose value is the name of the thread that works out its outcome."""
    return executor.collective_rpc(faults.nap, 30.0, args=(seconds,), non_block=True, aggregate=_thread, **kwargs)


class Held:
    """The same, answered only when somebody has begun to receive for it: call `answer` and then wait for ``future``."""

    def __init__(self, executor: ec.Executor, directory: Path) -> None:
        directory.mkdir()
        self._gate, self._receiver = Gate(directory), executor._group._receiver  # type: ignore[union-attr] # ours
        self.future: Future[Any] = executor.collective_rpc(
            workers.wait_at, 30.0, args=(self._gate,), non_block=True, aggregate=_thread
        )

    def answer(self) -> None:
        """Returns at once."""
        threading.Thread(target=self._answer_when_led).start()

    def _answer_when_led(self) -> None:
        eventually(self._is_led)
        self._gate.open()

    def _is_led(self) -> bool:
        leader = self._receiver._leader.get(None)
        return leader is not None and getattr(leader, "future", self.future) is self.future


# Who receives


def test_the_main_thread_receives(launch: Launch, tmp_path: Path) -> None:
    """The main thread works out what it waits for, and its future is done as soon as it has that."""
    executor = launch(2)
    for number in range(10):
        held = Held(executor, tmp_path / str(number))
        held.answer()
        future = held.future
        assert [True, False] == [future.running(), future.done()]
        assert threading.main_thread().name == future.result(30.0)
        assert [False, True] == [future.running(), future.done()]


def test_another_thread_receives(launch: Launch, tmp_path: Path) -> None:
    """Any other thread does so, too, and runs the callbacks."""
    executor = launch(2)
    called: list[str] = []
    with ThreadPoolExecutor(1, thread_name_prefix="waiter") as pool:
        held = Held(executor, tmp_path / "gate")
        held.future.add_done_callback(lambda _: called.append(threading.current_thread().name))
        held.answer()
        assert "waiter_0" == pool.submit(held.future.result, 30.0).result()
        assert ["waiter_0"] == called
        for _ in range(200):  # with nothing but acknowledgements there is next to nothing to be done for a call
            future = executor.collective_rpc("check_health", non_block=True)
            assert [None, None] == pool.submit(future.result, 30.0).result()


def test_the_background_thread_receives_for_crowds(launch: Launch) -> None:
    """While many calls are in flight, answers are received for all of them in one place."""
    executor = launch(2)
    futures = [_submit(executor) for _ in range(8)]
    assert "exec-mp" == futures[0].result(30.0)


def test_the_background_thread_receives_where_rank_0_runs_in_the_driver(launch: Launch) -> None:
    """Answers of rank 0 come from a thread of its own then: a caller that looks at those of others would miss them."""
    executor = launch(2, parallel={"driver_worker": "inline"})
    assert _submit(executor).result(30.0) != threading.main_thread().name
    assert _submit(executor, ranks=[0]).result(30.0) != threading.main_thread().name


def test_the_oldest_of_several(launch: Launch, tmp_path: Path) -> None:
    """With few steps under way each is received in turn by who waits for it."""
    executor = launch(2)
    calls = [Held(executor, tmp_path / str(number)) for number in range(2)]
    for held in calls:
        held.answer()
        assert threading.main_thread().name == held.future.result(30.0)


def test_large_results_are_received_in_the_background(launch: Launch) -> None:
    """Memory that is handed out once is not handed to a thread that Ctrl-C may end."""
    executor = launch(2)
    where: list[str] = []

    def large(worker: Any) -> bytes:
        time.sleep(0.02)  # so that it is waited for
        return bytes(1_000_000)

    def look(values: list[bytes]) -> int:
        where.append(_thread(values))
        return sum(map(len, values))

    assert 2_000_000 == executor.collective_rpc(large, non_block=True, aggregate=look).result(30.0)
    assert ["exec-mp"] == where


def _in_two_parts(*, report: bool) -> Callable[[Any], int]:
    """Rank 0 answers with a value at once; rank 1 later, with nothing."""

    def method(worker: Any) -> int:
        if worker.context.rank:
            time.sleep(0.3)
            if report:
                worker.context.report_progress(1, 2, "half")
                time.sleep(0.3)
        return 7

    return method


def test_value_read_before_progress_is_reported(launch: Launch) -> None:
    """The same caller, which has passed progress on in between."""
    executor = launch(2)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        called = pool.submit(executor.collective_rpc, _in_two_parts(report=True), 30.0, reply_ranks=[0])
        assert [7] == called.result(40.0)
    assert time.monotonic() - began < 15.0


# Answered while it is submitted


@pytest.fixture(params=["main thread", "another"])
def run_on(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Runs a function there."""
    if request.param == "main thread":
        yield lambda function: function()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="submitter") as pool:
        yield lambda function: pool.submit(function).result(30.0)


def _wait_when_sent(executor: ec.Executor, monkeypatch: pytest.MonkeyPatch, then: Callable[[Any], object]) -> None:
    """From now on ``then(call)`` comes between sending a call and looking for its answer."""
    group: Any = executor._group
    send = group._send

    def patient(call: Any, wait: bool) -> None:
        send(call, wait)
        then(call)

    monkeypatch.setattr(group, "_send", patient)


def _is_answered(executor: ec.Executor, call: Any) -> bool:
    channel: Any = executor._group._channel  # type: ignore[union-attr] # ours
    words = channel.words(channel.glance())
    acks, replies = channel.acks(words), {rank for rank, _ in channel.replies(words)}
    return call.finished or all(acks[rank] >= call.id or rank in replies for rank in call.ranks)


OUTCOMES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"method": "check_health"}, "[None, None]"),
    "values": ({"method": "where", "args": (1,)}, "[(0, 1), (1, 1)]"),
    "one rank": ({"method": "where", "args": (1,), "ranks": [1]}, "[(1, 1)]"),
    "no value": ({"method": "where", "args": (1,), "reply_ranks": []}, "[]"),
    "aggregate": ({"method": "where", "args": (1,), "aggregate": len}, "2"),
    "an error": ({"method": lambda worker: 1 // 0}, "ZeroDivisionError: integer division or modulo by zero"),
}


@pytest.mark.parametrize("kind", OUTCOMES)
def test_answered_at_once(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, run_on: Callable[[Callable[[], Any]], Any], kind: str
) -> None:
    """A call that is answered while it is being submitted has its outcome when its future is returned."""
    executor = launch(2)
    call, wanted = OUTCOMES[kind]
    executor.collective_rpc("check_health")
    _wait_when_sent(executor, monkeypatch, lambda call: eventually(lambda: _is_answered(executor, call)))

    for _ in range(5):
        future, at_once = run_on(lambda: ((future := executor.collective_rpc(**call, non_block=True)), future.done()))
        assert at_once or kind == "an error"  # which may wait for news of a death that has led to it
        assert wanted == _outcome(future)
        told: list[str] = []
        future.add_done_callback(lambda future, told=told: told.append(_outcome(future)))
        assert ({future}, set()) == concurrent.futures.wait([future], timeout=0)
        assert [True, False, False] == [future.done(), future.running(), future.cancel()]
        assert [wanted] == told


def test_answered_in_part_at_once(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, run_on: Callable[[Callable[[], Any]], Any]
) -> None:
    """Who waits for a call of which one rank's value was read when it was submitted sees that the other rank is done."""
    executor = launch(2)
    channel: Any = executor._group._channel  # type: ignore[union-attr] # ours
    _wait_when_sent(
        executor, monkeypatch, lambda _: eventually(lambda: channel.replies(channel.words(channel.glance())))
    )
    began = time.monotonic()
    method = _in_two_parts(report=False)
    assert [7] == run_on(lambda: executor.collective_rpc(method, non_block=True, reply_ranks=[0]).result(30.0))
    assert time.monotonic() - began < 15.0  # not when it looks for the last time


def test_submitting_runs_nobody_elses_callbacks(launch: Launch) -> None:
    """Who submits may hold what a callback waits for."""
    executor = launch(2)
    mine, stuck = threading.Lock(), []

    def callback(_: Future[Any]) -> None:
        if mine.acquire(timeout=5):
            mine.release()
        else:
            stuck.append(threading.current_thread().name)

    def submit_again_and_again() -> None:
        for number in range(150):
            first = executor.collective_rpc(faults.nap, args=(0.0005 * (number % 4),), non_block=True)
            first.add_done_callback(callback)
            with mine:
                following = [executor.collective_rpc("where", args=(number,), non_block=True) for _ in range(3)]
            assert [[(0, number), (1, number)]] * 3 == [future.result(30.0) for future in following]

    submit_again_and_again()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(submit_again_and_again).result(60.0)
    assert [] == stuck


# What others see of it


def test_everybody_gets_the_same(launch: Launch) -> None:
    """The outcome is worked out once, and all waiters and callbacks get it: there may be many at a time."""
    executor = launch(2)
    with ThreadPoolExecutor(4) as pool:
        for round_number in range(50):
            outcomes: list[object] = []

            def work_out(_: list[Any], outcomes: list[object] = outcomes) -> object:
                outcomes.append(object())
                return outcomes[-1]

            seconds = 0.002 * (round_number % 3)
            future = executor.collective_rpc(faults.nap, 30.0, args=(seconds,), non_block=True, aggregate=work_out)
            called: Future[Any] = Future()
            others = [pool.submit(future.result, 30.0) for _ in range(4)]
            mine = future.result(30.0)
            future.add_done_callback(called.set_result)
            done, _ = concurrent.futures.wait([future], timeout=30.0)
            assert {future} == done
            assert [mine] == outcomes
            assert [mine] * 5 == [other.result(30.0) for other in [*others, future]]
            assert called.result(30.0) is future


@pytest.mark.parametrize(
    "wait", [concurrent.futures.wait, lambda futures: list(concurrent.futures.as_completed(futures))]
)
def test_main_thread_wakes_who_waits_otherwise(launch: Launch, tmp_path: Path, wait: Callable[..., Any]) -> None:
    """Who waits for several futures at a time is told when the main thread receives the answer for itself."""
    executor = launch(2)
    with ThreadPoolExecutor(1) as pool:
        for number in range(5):
            held = Held(executor, tmp_path / str(number))
            waiting = pool.submit(wait, [held.future])
            eventually(lambda held=held: held.future._waiters)  # type: ignore[misc]
            held.answer()
            assert threading.main_thread().name == held.future.result(30.0)
            waiting.result(30.0)


def test_future_that_another_thread_is_setting(launch: Launch, tmp_path: Path) -> None:
    """The main thread has its outcome, and leaves it to that thread to set it."""
    executor = launch(2)
    held = Held(executor, tmp_path / "gate")
    future: Any = held.future
    entry, _ = future._call
    entry.delivered = True
    held.answer()

    assert threading.main_thread().name == future.result(30.0)
    assert not Future.done(future)
    future.set_result(future.result())
    assert Future.done(future)


def test_error_is_raised_and_told(launch: Launch) -> None:
    """A failing call raises its error from ``result``, gives it as ``exception``, and is done."""
    executor = launch(2)
    failed = executor.collective_rpc("no_such_method", non_block=True)
    with pytest.raises(AttributeError):
        failed.result(30.0)
    assert failed.done()
    error = executor.collective_rpc("no_such_method", non_block=True).exception(30.0)
    assert isinstance(error, AttributeError)
    with pytest.raises(ZeroDivisionError):
        executor.collective_rpc("where", non_block=True, aggregate=lambda _: 1 // 0).result(30.0)
    assert executor.collective_rpc("where", non_block=True).exception(30.0) is None


def test_timeout_of_the_waiter(launch: Launch, tmp_path: Path) -> None:
    """``result`` waits no longer than asked, and the call goes on."""
    executor = launch(2)
    held = Held(executor, tmp_path / "gate")
    for timeout in (-1, 0, 0.05):
        with pytest.raises(TimeoutError):
            held.future.result(timeout)
    with pytest.raises(TimeoutError):
        held.future.exception(0.01)
    assert not held.future.done()
    held.answer()
    assert threading.main_thread().name == held.future.result(30.0)


def test_deadline_of_the_call(launch: Launch) -> None:
    """Past the call's own deadline its waiter gets the error with the stacks, from whichever thread."""
    executor = launch(2)
    waiters: list[Callable[[Future[Any]], Any]] = [lambda future: future.exception(30.0)]
    with ThreadPoolExecutor(1) as pool:
        waiters.append(lambda future: pool.submit(future.exception, 30.0).result())
        for wait in waiters:
            error = wait(executor.collective_rpc(faults.nap, 0.2, args=(1.0, 1), non_block=True))
            assert isinstance(error, ec.RpcTimeoutError)
            assert (1,) == error.pending_ranks
            assert "nap" in error.stacks[1]


def test_death_while_waiting(launch: Launch) -> None:
    """A worker's death ends the wait at once."""
    executor = launch(2)
    future = executor.collective_rpc(faults.kill_itself, args=(9, 1, 0.2), non_block=True)
    with pytest.raises(ec.WorkerDiedError):
        future.result(30.0)


def test_shutdown_while_waiting(launch: Launch) -> None:
    """Another thread closes the executor: the wait ends, and the future stays readable."""
    executor = launch(2)
    future = executor.collective_rpc(faults.nap, args=(20.0,), non_block=True)
    closing = threading.Timer(0.2, executor.shutdown)
    closing.start()
    with pytest.raises(ec.ExecutorClosedError):
        future.result(30.0)
    closing.join()
    assert isinstance(future.exception(0), ec.ExecutorClosedError)


def test_nothing_waits_for_the_garbage_collector(launch: Launch) -> None:
    """A result goes with the last that refers to it, also when a thread has waited for it."""
    executor = launch(2)

    class Value:
        pass

    gc.disable()
    try:
        future = executor.collective_rpc(faults.nap, args=(0.01,), non_block=True, aggregate=lambda _: Value())
        gone = weakref.ref(future.result(30.0))
        del future
        eventually(lambda: gone() is None)
    finally:
        gc.enable()


# Callbacks, on the background thread, that wait


def test_callback_waits_for_another_future(launch: Launch) -> None:
    """A callback may wait on a future whose answer its own thread has to read, or has read already."""
    executor = launch(2)
    for seconds in (0.0, 0.05):
        called: Future[Any] = Future()
        first = executor.collective_rpc(faults.nap, args=(0.02,), non_block=True)
        second = executor.collective_rpc(faults.nap, args=(seconds,), non_block=True)
        first.add_done_callback(lambda _, s=second, c=called: c.set_result(s.exception(10.0)))  # type: ignore[misc]
        assert called.result(30.0) is None


def test_answer_to_a_callback_that_calls_is_read_by_another(launch: Launch) -> None:
    """The background thread waits in a callback while another caller leads, who wakes it when its call is answered."""
    executor = launch(2)
    inside, called = threading.Event(), Future[float]()

    def call_again(_: Future[Any]) -> None:
        began = time.monotonic()
        inside.set()
        executor.collective_rpc(faults.nap, 30.0, args=(0.2,), ranks=[0])
        called.set_result(time.monotonic() - began)

    executor.collective_rpc("where", non_block=True).add_done_callback(call_again)
    assert inside.wait(30.0)
    with ThreadPoolExecutor(1) as pool:  # the main thread would not lead while another call is in flight
        other = pool.submit(executor.collective_rpc, faults.nap, 30.0, args=(0.6,), ranks=[1])
        assert [1] == other.result(30.0)
    assert called.result(30.0) < 20.0  # its own deadline, which would have woken it, is later


# Ctrl-C

KINDS: dict[str, dict[str, Any]] = {
    "nothing": {"method": lambda worker, seconds: _after(seconds, None)},
    "a value": {"method": faults.nap},
    "staggered": {"method": faults.nap, "max_concurrent_workers": 1},
    "an error": {"method": lambda worker, seconds: _after(seconds, 1) // 0},
    "large values": {"method": lambda worker, seconds: bytes(_after(seconds, 100_000))},
    "one rank": {"method": faults.nap, "ranks": [1]},
}
_A_WHILE_S = 0.003  # for a call to take, so that it is waited for


def _after(seconds: float, value: Any) -> Any:
    time.sleep(seconds)
    return value


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("before", [True, False], ids=["callback", "late callback"])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupt_at_every_point_of_a_wait(launch: Launch, kind: str, before: bool) -> None:
    """Wherever Ctrl-C strikes who waits: the future has its outcome afterwards, told once to others, and so has the next one."""
    executor = launch(2, rpc={"timeout_s": 20.0})
    # Who does not come to wait before the answer, the machine being busy elsewhere, is not struck while it waits.
    assert any(_strike_waits(executor, kind, before, seconds) > 20 for seconds in (_A_WHILE_S, 0.03, 0.3))
    assert _submit(executor, 0.3).result(30.0) == "MainThread"  # who waits receives, as before


def _strike_waits(executor: ec.Executor, kind: str, before: bool, seconds: float) -> int:
    """Interrupts waits for calls that take ``seconds``, each at another point. How many it has come in time for."""
    call: dict[str, Any] = {**KINDS[kind], "args": (seconds,), "non_block": True}
    wanted = _outcome(executor.collective_rpc(**call))
    struck = 0
    for at in range(1, 150):
        told: list[str] = []
        future = executor.collective_rpc(**call)
        following = executor.collective_rpc("where", args=(at,), non_block=True) if at % 2 else None
        if before:
            future.add_done_callback(lambda future, told=told: told.append(_outcome(future)))
        where = interrupted(lambda future=future: future.exception(20.0), at)  # type: ignore[misc]
        struck += where is not None
        if not before:
            future.add_done_callback(lambda future, told=told: told.append(_outcome(future)))
        assert wanted == _outcome(future), where
        if following is not None:
            assert [(0, at), (1, at)] == following.result(20.0), where
        assert [(0, at), (1, at)] == executor.collective_rpc("where", args=(at,)), where
        eventually(lambda told=told: told == [wanted])  # type: ignore[misc]
    return struck


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_interrupt_at_every_point_of_a_submission(launch: Launch, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Wherever Ctrl-C strikes who submits a call that is answered meanwhile: later calls get their own answers."""
    executor = launch(2, rpc={"timeout_s": 20.0, "max_in_flight": 2})
    calls = executor._group._calls  # type: ignore[union-attr] # ours
    call: dict[str, Any] = {**KINDS[kind], "args": (_A_WHILE_S,), "non_block": True}
    wanted = _outcome(executor.collective_rpc(**call))
    _wait_when_sent(executor, monkeypatch, lambda _: time.sleep(0.01))
    at, where = 0, ""
    while where is not None:
        at += 1
        where = interrupted(lambda: executor.collective_rpc(**call), at)  # type: ignore[assignment]
        assert wanted == _outcome(executor.collective_rpc(**call)), where
        assert [(0, at), (1, at)] == executor.collective_rpc("where", args=(at,)), where
        eventually(lambda: not calls.in_flight)
    assert at > 20


def _outcome(future: Future[Any]) -> str:
    """Of a future, whole: errors are equal by what they say."""
    error = future.exception(20.0)
    return repr(future.result(20.0)) if error is None else f"{type(error).__name__}: {error}"
