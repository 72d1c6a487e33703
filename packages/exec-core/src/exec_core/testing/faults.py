"""Ways for a worker to go wrong, and how to see that processes are gone.

The functions that take a worker are callables for `collective_rpc`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from exec_core.testing.sync import DEADLINE_S, eventually

FOREVER_S = 600.0  # longer than any test waits


def is_gone(pid: int) -> bool:
    """Whether this process has ended; a zombie has, whoever is slow to reap it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in {b"Z", b"X"}
    except OSError:
        return True


def await_gone(pids: Iterable[int], deadline_s: float = DEADLINE_S) -> float:
    """Waits until all ``pids`` have ended; how long that took, in seconds.

    Raises:
        TimeoutError: when one is alive after ``deadline_s``.
    """
    began, waited_for = time.monotonic(), list(pids)
    eventually(lambda: all(map(is_gone, waited_for)), deadline_s=deadline_s)
    return time.monotonic() - began


def pid_of(worker: Any) -> int:
    """The worker's process."""
    return os.getpid()


def nap(worker: Any, seconds: float = FOREVER_S, rank: int | None = None) -> int:
    """Sleeps on ``rank``, or on all; returns the rank."""
    if rank is None or worker.context.rank == rank:
        time.sleep(seconds)
    return int(worker.context.rank)


def hold_gil(worker: Any, seconds: float = FOREVER_S, rank: int | None = None) -> int:
    """Stays in C with the interpreter's lock held on ``rank``, or on all; no signal gets it out."""
    if rank is None or worker.context.rank == rank:
        libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(128)  # zeroes: an unlocked mutex
        libc.pthread_mutex_lock(mutex)
        until = time.time() + seconds
        libc.pthread_mutex_timedlock(mutex, (ctypes.c_long * 2)(int(until), int(until % 1 * 1e9)))
    return int(worker.context.rank)


def collective_without(worker: Any, absent: int | None = None) -> int:
    """All ranks enter a collective, but for ``absent``, which sleeps: nobody gets out."""
    import torch
    import torch.distributed as dist

    if worker.context.rank == absent:
        time.sleep(FOREVER_S)
    dist.all_reduce(torch.ones(4))
    return int(worker.context.rank)


def collectives_for_ever(worker: Any) -> None:
    """One collective after the other, until a rank is missing."""
    import torch
    import torch.distributed as dist

    while True:
        dist.all_reduce(torch.ones(4))


def start_child(worker: Any, own_session: bool = False) -> int:
    """Starts a process that outlives the call; its pid.

    Args:
        own_session: it leaves the worker's session and process group.
    """
    return subprocess.Popen(["sleep", str(int(FOREVER_S))], start_new_session=own_session).pid  # noqa: S607


def kill_itself(worker: Any, number: int = signal.SIGKILL, rank: int | None = None, delay_s: float = 0.0) -> int:
    """Sends a signal to its own process on ``rank``, or on all."""
    if rank is None or worker.context.rank == rank:
        time.sleep(delay_s)
        os.kill(os.getpid(), number)
        time.sleep(FOREVER_S)
    return int(worker.context.rank)


def crash(worker: Any, rank: int | None = None) -> int:
    """Reads from address zero on ``rank``, or on all."""
    if rank is None or worker.context.rank == rank:
        ctypes.string_at(0)
    return int(worker.context.rank)


def exit_at_once(worker: Any, code: int, rank: int | None = None) -> int:
    """Leaves without any clean-up on ``rank``, or on all."""
    if rank is None or worker.context.rank == rank:
        os._exit(code)
    return int(worker.context.rank)


def say(worker: Any, text: str) -> None:
    """Writes a line to stderr, and another to stdout."""
    print(text, file=sys.stderr, flush=True)
    print(text, flush=True)
