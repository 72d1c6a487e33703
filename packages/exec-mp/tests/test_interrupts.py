"""Ctrl-C in the main thread, at any moment of a call: the call is over for its caller, and nothing else is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import exec_core as ec
from exec_core.testing import eventually, faults
from exec_core.testing.interrupts import interrupted

Launch = Callable[..., ec.Executor]


def test_interrupted_call_leaves_a_usable_executor(launch: Launch) -> None:
    """A blocking call that Ctrl-C has ended is over for its caller; the next one gets its own answer."""
    executor = launch(2)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.01 * (1 + number % 3))
            with pytest.raises(KeyboardInterrupt):
                executor.collective_rpc(faults.nap, args=(0.05,))
            assert [(0, number), (1, number)] == executor.collective_rpc("where", args=(number,))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_interrupts_at_any_moment(launch: Launch) -> None:
    """However often and wherever Ctrl-C strikes, later calls and futures get their own answers."""
    executor = launch(2)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        for number in range(300):
            future = executor.collective_rpc("where", args=(("future", number),), non_block=True)
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + number))
                try:
                    for i in range(50):
                        assert [(0, i), (1, i)] == executor.collective_rpc("where", args=(i,))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            assert [(0, ("future", number)), (1, ("future", number))] == future.result(30)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert interrupted > 0


# Ctrl-C may come between the opening of a file and its `with`: then it is closed as garbage, which Python tells.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_interrupts_while_other_threads_call(launch: Launch) -> None:
    """Ctrl-C in the main thread leaves the calls of other threads alone, blocking ones and futures."""
    executor = launch(2)
    stop = threading.Event()

    def call(thread: int) -> int:
        number = 0
        while not stop.is_set():
            number += 1
            sent: tuple[int, int] = (thread, number)
            future = executor.collective_rpc("where", 30.0, args=(sent,), non_block=True)
            assert [(0, number), (1, number)] == executor.collective_rpc("where", 30.0, args=(number,))
            assert [None, None] == executor.collective_rpc("check_health", 30.0)
            assert [(0, sent), (1, sent)] == future.result(30)
        return number

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(call, thread) for thread in range(2)]
        try:
            for number in range(2000):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + number % 100))
                    try:
                        for i in range(50):
                            assert [(0, i), (1, i)] == executor.collective_rpc("where", 30.0, args=(i,))
                            assert [None, None] == executor.collective_rpc("check_health", 30.0)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
        finally:
            signal.signal(signal.SIGALRM, before)
            stop.set()

    assert all(one.result() > 0 for one in calls)
    assert interrupted > 0
    assert [(0, 7), (1, 7)] == executor.collective_rpc("where", 30.0, args=(7,))


# At every point


KINDS: dict[str, dict[str, Any]] = {
    "prompt": {"method": "check_health"},
    "with a value": {"method": "where", "args": (1,)},
    "staggered": {"method": "where", "args": (1,), "max_concurrent_workers": 1},
    "future": {"method": "where", "args": (1,), "non_block": True},
    "staggered future": {"method": "where", "args": (1,), "non_block": True, "max_concurrent_workers": 1},
    "large values": {"method": lambda worker: bytes(100_000)},
    "some ranks": {"method": "where", "args": (1,), "ranks": [1]},
}


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # one that strikes in a finaliser is lost
@pytest.mark.parametrize("driver_worker", ["process", "inline"])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupt_at_every_point(launch: Launch, kind: str, driver_worker: str) -> None:
    """Wherever it strikes, the next calls get their own answers, and no place in flight is lost."""
    executor = launch(2, parallel={"driver_worker": driver_worker}, rpc={"timeout_s": 20.0, "max_in_flight": 2})
    calls = executor._group._calls  # type: ignore[union-attr] # ours
    call, at = KINDS[kind], 0
    where: str | None = ""
    while where is not None:
        at += 1
        where = interrupted(lambda: executor.collective_rpc(**call), at)
        try:
            for number in (at, -at):
                assert [(0, number), (1, number)] == executor.collective_rpc("where", args=(number,))
            assert [100_000] * 2 == list(map(len, executor.collective_rpc(lambda worker: bytes(100_000))))
            assert [0, 1] == [r for r, _ in executor.collective_rpc("where", args=(0,), max_concurrent_workers=1)]
            eventually(lambda: not calls.in_flight)  # it may be the background thread that deals with the last one
        except Exception as error:
            error.add_note(f"after an interrupt at {where}")
            raise
    assert at > 20  # it had something to interrupt


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupt_while_waiting_for_room_keeps_the_value_of_a_future(launch: Launch) -> None:
    """The main thread, which Ctrl-C may strike, takes nobody else's answer while it waits to send its own call."""
    executor = launch(2, rpc={"timeout_s": 20.0, "max_in_flight": 1})
    where: str | None = ""
    at = 0
    while where is not None:
        at += 1
        future = executor.collective_rpc(lambda worker: bytes(100_000), non_block=True)
        where = interrupted(lambda: executor.collective_rpc("where", args=(1,)), at)
        assert [100_000] * 2 == list(map(len, future.result(30.0))), where
    assert at > 20
