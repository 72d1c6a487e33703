"""Puts ranks that are woken together on processors of their own, where there are hardly more of those than processes.

Who is woken tends to run where the driver does, or where it slept, and the scheduler takes 0.1 s and more to see that most
share one processor while another is idle. Until then a call takes twice as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

processor = ctypes.CDLL(None).sched_getcpu
"""Where the calling thread runs, or -1."""


def spread(rank: int, world_size: int, driver: int) -> None:
    """Moves the calling thread to this rank's share of the processors that it may use, and leaves it free to be moved on.

    Does nothing where others are busy on this machine too: then the scheduler knows better.

    Args:
        driver: processor that the driver runs on; it is shared last.
    """
    allowed = os.sched_getaffinity(0)
    if not 1 < len(allowed) <= world_size + 1:
        return
    order = sorted(allowed)
    first = order.index(driver) + 1 if driver in allowed else 0
    chosen = order[(first + rank) % len(order)]
    if processor() == chosen or _runnable() > world_size + 1:
        return
    with contextlib.suppress(OSError):  # it has just been taken away
        os.sched_setaffinity(0, {chosen})
        os.sched_setaffinity(0, allowed)


def _runnable() -> int:
    """Threads of the whole machine that run or wait for a processor (proc(5), loadavg)."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            return int(file.read().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):  # a sandbox without it
        return 0
