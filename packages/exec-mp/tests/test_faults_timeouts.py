"""Calls that take too long: who is where, what becomes of late replies, and what health says."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import exec_core as ec
from exec_core.testing import Gate, eventually, faults, workers
from exec_core.testing.deadlines import AMPLE_S
from exec_mp import _stacks
from exec_mp._poller import Poller

Launch = Callable[..., ec.Executor]


def logged(text: str, event: str) -> list[dict[str, Any]]:
    """The JSON lines of a log that are about ``event``."""
    records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [record for record in records if record["event"] == event]


def test_late_reply_is_dropped(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A call times out while rank 1 waits; the next one gets its own answer; the late reply is logged once."""
    executor, gate = launch(2, log={"level": "warning"}), Gate(tmp_path)
    pid = executor.workers[1].pid
    with pytest.raises(ec.RpcTimeoutError) as caught:
        executor.collective_rpc(workers.wait_at, 0.3, args=(gate, 1))
    with pytest.raises(ec.RpcTimeoutError, match=r"rank 1 \(pid \d+\) has been in 'wait_at'"):
        executor.check_health()
    second = executor.collective_rpc("where", args=("second",), non_block=True)
    gate.open()

    assert [(0, "second"), (1, "second")] == second.result(30)
    assert [(0, "third"), (1, "third")] == executor.collective_rpc("where", args=("third",))
    executor.check_health()
    assert ("wait_at", 0.3, (0,), (1,)) == (
        caught.value.method,
        caught.value.timeout_s,
        caught.value.answered_ranks,
        caught.value.pending_ranks,
    )
    assert "eventually(lambda: os.path.exists" in caught.value.stacks[1]  # the line that it waits in
    assert caught.value.stacks[1].rstrip() in str(caught.value)
    (late,) = logged(capfd.readouterr().err, "late reply dropped")
    assert ("wait_at", 1, caught.value.request_id) == (late["method"], late["from_rank"], late["request_id"])
    assert {1: pid} == caught.value.pids
    assert f"ranks [1 (pid {pid})] have not answered" in str(caught.value)


@pytest.mark.parametrize("how", ["main", "thread", "future"])
def test_timeout_tells_who_has_only_acknowledged(launch: Launch, tmp_path: Path, how: str) -> None:
    """Ranks that have nothing to say but that they are done have answered as well, whoever waits for them."""
    executor, gate = launch(3), Gate(tmp_path)

    call: Callable[..., Any] = functools.partial(
        executor.collective_rpc, workers.wait_at, AMPLE_S, (gate, 1), reply_ranks=()
    )
    with ThreadPoolExecutor(1) as pool, pytest.raises(ec.RpcTimeoutError) as caught:
        if how == "main":
            call()
        else:
            (pool.submit(call) if how == "thread" else call(non_block=True)).result(30)
    gate.open()

    assert ((0, 2), (1,)) == (caught.value.answered_ranks, caught.value.pending_ranks)
    assert [(rank, 1) for rank in range(3)] == executor.collective_rpc("where", 30.0, args=(1,))


def test_late_error_is_dropped(launch: Launch, tmp_path: Path) -> None:
    """An error that comes too late is nobody's: the next call gets its own answer."""
    executor, gate = launch(2), Gate(tmp_path)

    def wait_and_fail(worker: Any) -> None:
        gate.wait(worker.context.rank)
        raise ValueError("too late")

    with pytest.raises(ec.RpcTimeoutError):
        executor.collective_rpc(wait_and_fail, 0.2)
    gate.open()

    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_next_call_waits_within_its_own_deadline(launch: Launch, tmp_path: Path) -> None:
    """A call behind one that has timed out has a deadline of its own, and says who has not answered it."""
    executor, gate = launch(2), Gate(tmp_path)
    for _ in range(3):
        with pytest.raises(ec.RpcTimeoutError) as caught:
            executor.collective_rpc(workers.wait_at, 0.2, args=(gate, 1))
    with pytest.raises(ec.RpcTimeoutError) as behind:
        executor.collective_rpc("where", 0.2)
    gate.open()

    assert ((0,), (1,)) == (caught.value.answered_ranks, caught.value.pending_ranks)
    assert ("where", (0,), (1,)) == (behind.value.method, behind.value.answered_ranks, behind.value.pending_ranks)
    assert "sync.py" in behind.value.stacks[1]  # where it is, which is in another call
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_time_out_of_a_future_has_stacks(launch: Launch, tmp_path: Path) -> None:
    """A future that nobody waits on times out by itself, with the stacks of all pending ranks."""
    executor, gate = launch(3), Gate(tmp_path)
    future = executor.collective_rpc(workers.wait_at, 0.2, args=(gate,), non_block=True)
    eventually(future.done)
    gate.open()

    error = future.exception()
    assert isinstance(error, ec.RpcTimeoutError)
    assert [0, 1, 2] == list(error.stacks)
    assert all("gate.wait" in stack for stack in error.stacks.values())


def gates(directory: Path, count: int) -> list[Gate]:
    """Several gates, each in a directory of its own."""
    made = [directory / str(number) for number in range(count)]
    for path in made:
        path.mkdir()
    return list(map(Gate, made))


def test_call_is_busy_from_when_its_rank_came_to_it(launch: Launch, tmp_path: Path) -> None:
    """The time for which a call waits behind another, in its rank, is no time in it."""
    executor, (first, second) = launch(1), gates(tmp_path, 2)
    sent = [executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True) for gate in (first, second)]
    eventually(lambda: executor.workers[0].busy_s > 0.2)
    opened = time.monotonic()
    first.open()
    assert [0] == sent[0].result(30.0)
    second.entered([0])
    (info,) = executor.workers
    passed_s = time.monotonic() - opened
    second.open()

    assert [0] == sent[1].result(30.0)
    assert ("busy", "wait_at") == (info.state, info.method)
    assert 0.0 < info.busy_s <= passed_s


def test_time_limits_of_futures_do_not_wake_anybody_before_their_time(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The background thread knows the time of one that is over already; a shorter one is met in time all the same."""
    executor, (first, second) = launch(2), gates(tmp_path, 2)
    receiver = executor._group._receiver  # type: ignore[union-attr] # ours
    woken: list[int] = []
    limited = executor.collective_rpc(workers.wait_at, 600.0, args=(first,), non_block=True)
    eventually(lambda: receiver._wake_at < math.inf)
    first.open()
    assert [0, 1] == limited.result(30.0)
    wake = Poller.wake

    def counted(poller: Poller) -> None:
        woken.append(1)
        wake(poller)

    monkeypatch.setattr(Poller, "wake", counted)
    with ThreadPoolExecutor(1) as pool:  # where the main thread waits, the background thread is woken to tell others
        for number in range(50):
            future = executor.collective_rpc("where", 600.0 + number, args=(number,), non_block=True)
            assert [(0, number), (1, number)] == pool.submit(future.result).result()
    times_woken = len(woken)
    late = executor.collective_rpc(workers.wait_at, 0.2, args=(second,), non_block=True)
    error = late.exception(30.0)
    second.open()

    assert 0 == times_woken
    assert isinstance(
        error, ec.RpcTimeoutError
    )  # not after 30 s: unless it is awake anyway, the thread was woken for that


def test_stacks_of_ranks_in_a_collective(launch: Launch) -> None:
    """A rank that is missing in a collective, and those that wait for it there, are each shown at their line."""
    executor = launch(2, gloo=True, rpc={"shutdown_timeout_s": 0.2})
    with pytest.raises(ec.RpcTimeoutError) as caught:
        executor.collective_rpc(faults.collective_without, 0.5, args=(1,))

    assert "dist.all_reduce(torch.ones(4))" in caught.value.stacks[0]
    assert "time.sleep(FOREVER_S)" in caught.value.stacks[1]


def test_stack_of_a_rank_that_holds_the_interpreter(launch: Launch) -> None:
    """A rank that is in C code with the interpreter's lock held is shown at its line, and finishes undisturbed."""
    executor = launch(2)
    with pytest.raises(ec.RpcTimeoutError) as caught:
        executor.collective_rpc(faults.hold_gil, 0.2, args=(1.5, 1))

    assert "libc.pthread_mutex_timedlock(" in caught.value.stacks[1]
    assert "C code there holds the interpreter" in caught.value.stacks[1]
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_stopped_rank_is_called_stopped(launch: Launch) -> None:
    """A process that has been stopped by a signal is said to be, and goes on when it is continued."""
    executor = launch(2)
    pid = executor.workers[1].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ec.RpcTimeoutError) as caught:
            executor.collective_rpc("where", 0.3)
    finally:
        os.kill(pid, signal.SIGCONT)

    assert ((0,), (1,)) == (caught.value.answered_ranks, caught.value.pending_ranks)
    assert "the process is stopped" in caught.value.stacks[1]
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_stacks_again_and_again(launch: Launch, tmp_path: Path) -> None:
    """Each report is of its own time-out: nothing of an earlier one is in it."""
    executor, gate = launch(1), Gate(tmp_path)

    def stay(worker: Any, name: str) -> None:
        exec(compile(f"def {name}():\n gate.wait(0)", name, "exec"), space := dict[str, Any](gate=gate))  # noqa: S102
        space[name]()

    reports = []
    for number in range(10):
        gate = Gate(tmp_path / str(number))
        Path(gate.directory).mkdir()
        with pytest.raises(ec.RpcTimeoutError) as caught:
            executor.collective_rpc(stay, 0.2, args=(f"frame_{number}",))
        reports.append(caught.value.stacks[0])
        gate.open()
        executor.collective_rpc("where")

    assert [[f"frame_{n}" in report for n in range(10)] for report in reports] == [
        [n == number for n in range(10)] for number in range(10)
    ]


def test_answer_to_an_earlier_report_is_no_answer() -> None:
    """A rank that counts its late answer to the last report, which has been read, is waited for."""
    counts = iter([5, 6, 6])  # when asked, after the late count, before the answer

    def answers(rank: int) -> int:
        if (count := next(counts, None)) is not None:
            return count
        os.pwrite(stacks.memory, b"here\n", 0)
        return 7

    stacks = _stacks.Stacks([0], answers)
    try:
        assert {0: "here\n"} == stacks.ask({0: os.getpid()}, lambda number, rank: None)
    finally:
        stacks.close()


def test_thousand_reports_under_load(launch: Launch, tmp_path: Path) -> None:
    """Reports of ranks that are computing, one after the other from several threads, harm no worker."""
    executor, stop = launch(2, rpc={"max_in_flight": 1100, "inline_bytes": 256}), tmp_path / "stop"
    pids = executor.collective_rpc(faults.pid_of)

    def compute(worker: Any) -> None:
        def deeper(left: int) -> list[Any]:
            return [deeper(left - 1)] if left else []

        while not stop.exists():
            deeper(50)  # frames come and go while they are looked at

    def time_out(_: int) -> dict[int, str]:
        with pytest.raises(ec.RpcTimeoutError) as caught:
            executor.collective_rpc("where", 0.001)
        return dict(caught.value.stacks)

    computing = executor.collective_rpc(compute, non_block=True)
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(time_out, range(1000)))
    stop.touch()

    assert [None, None] == computing.result(60)
    assert 1000 == sum({0, 1} == {rank for rank, text in stacks.items() if text} for stacks in reports)
    assert 900 < sum("in compute" in stacks[0] and "in compute" in stacks[1] for stacks in reports)
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))
    assert pids == executor.collective_rpc(faults.pid_of)


def test_health_names_a_rank_that_is_stuck(launch: Launch, tmp_path: Path) -> None:
    """Health is bad once a rank is in one call for longer than allowed, and says who, where and for how long."""
    executor, gate = launch(2, rpc={"stuck_after_s": 0.2}), Gate(tmp_path)
    executor.check_health()
    future = executor.collective_rpc(workers.wait_at, args=(gate, 1), non_block=True)
    executor.check_health()

    def health() -> ec.RpcTimeoutError | None:
        try:
            executor.check_health()
        except ec.RpcTimeoutError as error:
            return error
        return None

    error = eventually(health)
    assert error is not None
    gate.open()
    assert [0, 1] == future.result(30)
    executor.check_health()
    assert ("wait_at", (0,), (1,)) == (error.method, error.answered_ranks, error.pending_ranks)
    assert f"rank 1 (pid {executor.workers[1].pid}) has been in 'wait_at' for 0." in str(error)


def test_health_does_not_queue_behind_work(launch: Launch, tmp_path: Path) -> None:
    """Health is told at once while all ranks are busy."""
    executor, gate = launch(2), Gate(tmp_path)
    future = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
    gate.entered([0, 1])
    began = time.monotonic()
    for _ in range(100):
        executor.check_health()
    took = time.monotonic() - began
    gate.open()

    assert [0, 1] == future.result(30)
    assert took < 1.0  # of 100: the ranks stay for as long as the gate is closed


def test_progress_keeps_a_slow_start_alive(launch: Launch) -> None:
    """The limit for starting counts from the last progress that a rank has reported."""

    class Slow(workers.EchoWorker):
        def load_model(self) -> None:
            for step in range(10):
                time.sleep(0.2)
                self.context.report_progress(step, 10, "tensors")

    executor = launch(1, Slow, rpc={"startup_timeout_s": 1.0})

    assert [(0, 1)] == executor.collective_rpc("where", args=(1,))


def test_start_without_progress_times_out(launch: Launch) -> None:
    """A rank that reports the same place again and again makes no progress, and the error says where that is."""

    class Stuck(workers.EchoWorker):
        def load_model(self) -> None:
            while self.context.rank == 1:
                time.sleep(0.1)
                self.context.report_progress(3, 10, "tensors")

    began = time.monotonic()
    with pytest.raises(ec.WorkerStartupError) as caught:
        launch(2, Stuck, rpc={"startup_timeout_s": 1.0})

    assert time.monotonic() - began < 20
    assert (1, "load_model") == (caught.value.rank, caught.value.phase)
    assert "no progress for 1 s (RpcConfig.startup_timeout_s); the last was rank 1: 3 of 10 tensors" in str(
        caught.value
    )
    assert "self.context.report_progress(3, 10" in str(caught.value) or "time.sleep(0.1)" in str(caught.value)
