"""Closing: in every state, from everywhere, within its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import exec_core as ec
import exec_mp
from exec_core import base
from exec_core.testing import Gate, eventually, faults, workers

Launch = Callable[..., ec.Executor]

NOISE_S = 5.0  # what a busy machine may add to a second


def closed_in_s(executor: ec.Executor) -> float:
    """Shuts ``executor`` down; how long that took."""
    pids = [worker.pid for worker in executor.workers]
    began = time.monotonic()
    executor.shutdown()
    took = time.monotonic() - began
    assert ec.State.CLOSED is executor.state
    assert [True] * len(pids) == [faults.is_gone(pid) for pid in pids]
    return took


def test_rank_that_is_stopped(launch: Launch) -> None:
    """A rank in SIGSTOP hears nothing; it is gone within the time-out all the same."""
    executor = launch(2, rpc={"shutdown_timeout_s": 1.0})
    os.kill(executor.workers[1].pid, signal.SIGSTOP)

    assert closed_in_s(executor) < 1.0 + NOISE_S


@pytest.mark.parametrize("stuck", [faults.nap, faults.hold_gil], ids=["asleep", "in C"])
def test_rank_that_does_not_listen(launch: Launch, stuck: Any) -> None:
    """Ranks in the middle of a long call are ended within the time-out, and the call says why it failed."""
    executor = launch(2, rpc={"shutdown_timeout_s": 1.0})
    future = executor.collective_rpc(stuck, non_block=True)
    eventually(lambda: all(worker.method for worker in executor.workers))

    assert closed_in_s(executor) < 1.0 + NOISE_S
    with pytest.raises(ec.ExecutorClosedError):
        future.result(0)


def test_worker_that_ignores_the_polite_signal(launch: Launch, tmp_path: Path) -> None:
    """A worker that ignores SIGTERM is killed."""
    executor, gate = launch(1, rpc={"shutdown_timeout_s": 1.0}), Gate(tmp_path)

    def ignore(worker: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gate.wait(0)

    executor.collective_rpc(ignore, non_block=True)
    gate.entered([0])

    assert closed_in_s(executor) < 1.0 + NOISE_S


def test_failed_executor(launch: Launch) -> None:
    """A failed executor closes like any other."""
    executor = launch(2)
    with pytest.raises(ec.WorkerDiedError):
        executor.collective_rpc(faults.exit_at_once, args=(1, 1))

    assert closed_in_s(executor) < NOISE_S


@pytest.mark.parametrize("moment", ["importing", "loading"])
def test_executor_that_is_starting(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor whose start is in progress in another thread closes at once, and the start says why it ended."""
    reached = tmp_path / "reached"
    (tmp_path / "slow_import.py").write_text(
        f"import pathlib, time\npathlib.Path({str(reached)!r}).touch()\ntime.sleep({faults.FOREVER_S})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    exec_mp.stop_fork_server()

    class Starting(workers.EchoWorker):
        def load_model(self) -> None:
            reached.touch()
            time.sleep(faults.FOREVER_S)

    config = ec.ExecutorConfig(
        worker_cls=Starting,
        device=ec.DeviceConfig(device="cpu", distributed_backend="none"),
        rpc=ec.RpcConfig(preload=("slow_import",) if moment == "importing" else (), shutdown_timeout_s=1.0),
        log=ec.LogConfig(level="critical"),
    )
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(ec.create_executor, config)
        eventually(reached.exists)
        (executor,) = base._live
        began = time.monotonic()
        executor.shutdown()
        took = time.monotonic() - began
        with pytest.raises(ec.ExecutorClosedError, match="shut down while it was starting"):
            start.result(30)
    exec_mp.stop_fork_server()

    assert ec.State.CLOSED is executor.state
    assert took < 1.0 + NOISE_S


def test_many_callers_and_many_closers(launch: Launch) -> None:
    """Threads that call while others close each get an answer or the news of the end."""
    executor = launch(2, rpc={"max_in_flight": 2})
    begun = threading.Barrier(8)

    def call(number: int) -> Any:
        begun.wait()
        while True:
            try:
                assert [(0, number), (1, number)] == executor.collective_rpc("where", args=(number,))
            except ec.ExecutorClosedError as error:
                return error

    def close() -> None:
        begun.wait()
        executor.shutdown()
        assert ec.State.CLOSED is executor.state

    with ThreadPoolExecutor(8) as pool:
        ends = [*(pool.submit(call, number) for number in range(6)), *(pool.submit(close) for _ in range(2))]
        for end in ends:
            end.result(30)


def test_interrupted_close_is_taken_up_again(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while an executor closes ends the waiting; closing again finishes it, without waiting any longer."""
    executor = launch(2, rpc={"shutdown_timeout_s": 60.0})
    pids = [worker.pid for worker in executor.workers]
    executor.collective_rpc(faults.nap, non_block=True)
    eventually(lambda: all(worker.method for worker in executor.workers))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            executor.shutdown()
    finally:
        signal.signal(signal.SIGALRM, before)
    began = time.monotonic()
    executor.shutdown()

    assert time.monotonic() - began < NOISE_S
    assert ec.State.CLOSED is executor.state
    assert [True, True] == [faults.is_gone(pid) for pid in pids]


PROGRAM = """
import os, sys, threading, time
import exec_core as ec
from exec_core.testing import faults
from exec_core.testing.workers import EchoWorker

executor = ec.create_executor(ec.ExecutorConfig(
    worker_cls=EchoWorker,
    parallel=ec.ParallelConfig(tensor_parallel_size=2),
    device=ec.DeviceConfig(device="cpu", distributed_backend="none"),
    rpc=ec.RpcConfig(preload=(), shutdown_timeout_s=1.0, max_restarts=1),
    log=ec.LogConfig(level="warning"),
))
executor.register_failure_callback(lambda error: print("FAILED", error))
print(*executor.collective_rpc(faults.pid_of), flush=True)
"""


@pytest.mark.parametrize(
    ("last", "exit_code"),
    [
        pytest.param("", 0, id="end of the program"),
        pytest.param("sys.exit(5)", 5, id="sys.exit"),
        pytest.param("import atexit; atexit.register(executor.shutdown)", 0, id="atexit"),
        pytest.param("raise ValueError('host')", 1, id="error"),
        pytest.param("executor.collective_rpc(faults.nap, non_block=True)", 0, id="in a call"),
        pytest.param("threading.Thread(target=executor.collective_rpc, args=(faults.nap,), daemon=True).start()", 0,
                     id="in a call of a daemon thread"),
    ],
)  # fmt: skip
def test_program_that_does_not_close(last: str, exit_code: int) -> None:
    """A program that ends without closing its executor ends at once, with its own exit code, and nothing stays."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM + last], capture_output=True, text=True, timeout=60, check=False
    )

    assert exit_code == done.returncode, done.stderr
    (pids,) = done.stdout.splitlines()
    assert [True, True] == [faults.is_gone(int(pid)) for pid in pids.split()]
    assert ("ValueError: host" in done.stderr) is (exit_code == 1)
    assert 0 == done.stderr.count('"event"')
