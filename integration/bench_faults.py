"""How soon faults are told and cleaned up: `python integration/bench_faults.py`; CPU only, on a machine that is quiet.

    death to error          a rank of four is killed in a collective: until the pending call raises `WorkerDiedError`
    driver killed           SIGKILL to a program with two ranks: until its workers, their children, the fork server are gone
    restart()               two ranks that load nothing: how long `restart()` takes
    check_health()          eight ranks, all in a long call
    shutdown(), stopped     one rank of two is in SIGSTOP, the time-out is 1 s

A time from the kernel's report begins when this program's main thread has seen that the process's pidfd is readable, one
from SIGKILL just before the signal. The first may be too small, below zero even, since that thread is woken along with the
executor's; the second has the kernel's own work in it. The truth lies between them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import exec_core as ec
import exec_mp
from exec_core.testing import eventually, faults
from exec_core.testing.workers import EchoWorker

_LIMIT_S = 60.0
_AS_DRIVER = "--as-driver"
_METHODS: dict[str, Callable[..., Any] | None] = {"idle": None, "call": faults.nap, "gil": faults.hold_gil}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--deaths", type=int, default=50)
    parser.add_argument("--drivers", type=int, default=10, help="how many are killed in each state")
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--checks", type=int, default=2000, help="calls of check_health()")
    parser.add_argument("--shutdowns", type=int, default=5)
    parser.add_argument(_AS_DRIVER, choices=_METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.as_driver:
        _drive(options.as_driver)
        return
    exec_mp.prestart()
    print(f"{'':46}{'count':>6}{'p50':>10}{'p99':>10}{'worst':>10}  target")
    _deaths(options.deaths)
    for mode in _METHODS:
        _show(f"driver killed, {mode}: all gone", [_killed_driver_s(mode) for _ in range(options.drivers)], "100 ms")
    _show("restart() at N=2", _restarts_s(options.restarts), "1 s")
    _show("check_health() at N=8, all busy", _checks_s(options.checks), "50 us")
    _show("shutdown(), a rank stopped, time-out 1 s", [_stopped_s() for _ in range(options.shutdowns)], "2 s")


def _executor(world: int, *, gloo: bool = False, shutdown_timeout_s: float = 3.0) -> ec.Executor:
    return ec.create_executor(
        ec.ExecutorConfig(
            worker_cls=EchoWorker,
            backend="mp",
            parallel=ec.ParallelConfig(tensor_parallel_size=world),
            device=ec.DeviceConfig(device="cpu", threads_per_worker=1, distributed_backend=None if gloo else "none"),
            rpc=ec.RpcConfig(startup_timeout_s=_LIMIT_S, shutdown_timeout_s=shutdown_timeout_s),
            log=ec.LogConfig(level="critical"),
        )
    )


def _deaths(count: int) -> None:
    from_report, from_kill, others = list[float](), list[float](), list[float]()
    with _executor(4, gloo=True) as executor, ThreadPoolExecutor(1) as pool:
        for number in range(count):
            if number:
                executor.restart()
            victim, pids = number % 3, [worker.pid for worker in executor.workers]  # rank 3 is asleep, the others wait
            call = pool.submit(_time_of_death, executor)
            eventually(lambda: all(worker.method for worker in executor.workers))
            time.sleep(0.05)  # they are in the collective by now
            with _pidfds(pids) as fds:
                killed = time.monotonic()
                os.kill(pids[victim], signal.SIGKILL)
                reported = _gone([fds[victim]])
                others.append(_gone(fds) - killed)
            raised = call.result(_LIMIT_S)
            from_report.append(raised - reported)
            from_kill.append(raised - killed)
    _show("death to error at N=4, from the kernel's report", from_report, "100 ms")
    _show("death to error at N=4, from SIGKILL", from_kill, "")
    _show("a death at N=4: other ranks gone", others, "1 s")


def _time_of_death(executor: ec.Executor) -> float:
    try:
        executor.collective_rpc(faults.collective_without, args=(3,))
    except ec.WorkerDiedError:
        return time.monotonic()
    raise AssertionError("the call has returned")


def _drive(mode: str) -> None:
    """The program that is killed: says who must go with it, and stays."""
    executor, method = _executor(2), _METHODS[mode]
    pids = {pid for pair in executor.collective_rpc(_pids) for pid in pair}
    pids |= set(executor.collective_rpc(faults.start_child))
    if method is not None:
        executor.collective_rpc(method, non_block=True)
        eventually(lambda: all(worker.method for worker in executor.workers))
    print(json.dumps(sorted(pids)), flush=True)
    time.sleep(_LIMIT_S)


def _pids(_worker: Any) -> tuple[int, int]:
    """The worker and its parent, which is the fork server."""
    return os.getpid(), os.getppid()


def _killed_driver_s(mode: str) -> float:
    with subprocess.Popen([sys.executable, __file__, _AS_DRIVER, mode], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            pids = json.loads(driver.stdout.readline())
            with _pidfds(pids) as fds:
                killed = time.monotonic()
                driver.kill()
                return _gone(fds) - killed
        finally:
            driver.kill()


def _restarts_s(count: int) -> list[float]:
    taken = []
    with _executor(2) as executor:
        for _ in range(count):
            os.kill(executor.workers[1].pid, signal.SIGKILL)
            eventually(lambda: executor.state is ec.State.FAILED)
            began = time.monotonic()
            executor.restart()
            executor.collective_rpc("where", args=(0,))
            taken.append(time.monotonic() - began)
    return taken


def _checks_s(count: int) -> list[float]:
    taken = []
    with _executor(8, shutdown_timeout_s=0.5) as executor:
        executor.collective_rpc(faults.nap, non_block=True)
        eventually(lambda: all(worker.method for worker in executor.workers))
        for _ in range(count):
            began = time.perf_counter()
            executor.check_health()
            taken.append(time.perf_counter() - began)
    return taken


def _stopped_s() -> float:
    with _executor(2, shutdown_timeout_s=1.0) as executor:
        pids = [worker.pid for worker in executor.workers]
        with _pidfds(pids) as fds:
            os.kill(pids[1], signal.SIGSTOP)
            began = time.monotonic()
            executor.shutdown()
            return _gone(fds) - began


@contextlib.contextmanager
def _pidfds(pids: Sequence[int]) -> Iterator[list[int]]:
    """A descriptor of each process, readable when it has ended: from then on no number can mean another process."""
    with contextlib.ExitStack() as stack:
        fds = []
        for pid in pids:
            fds.append(os.pidfd_open(pid))
            stack.callback(os.close, fds[-1])
        yield fds


def _gone(fds: Sequence[int]) -> float:
    """Waits until these processes have ended; when the last one had."""
    until = time.monotonic() + _LIMIT_S
    for fd in fds:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError("a process that should have ended is alive")
    return time.monotonic()


def _show(name: str, seconds: Sequence[float], target: str) -> None:
    if not seconds:
        return
    ordered = sorted(seconds)
    figures = (statistics.median(ordered), ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], ordered[-1])
    print(f"{name:46}{len(ordered):6}{''.join(map(_readable, figures))}  {target}", flush=True)


def _readable(seconds: float) -> str:
    return f"{seconds * 1e6:7.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:7.1f} ms"


if __name__ == "__main__":
    main()
