"""Helps a thread that stands in line for a processor while another one is idle, where there are few of them.

A waiter wakes up, or has given way, on a processor that somebody else has just begun to use, perhaps for milliseconds inside
the kernel. The scheduler sees that another processor is idle with its next tick, which comes after up to 4 ms; a step of
decoding is late by that. But who has sent what the thread waits for is awake, elsewhere, and about to sleep. So it looks after
a while whether it was taken, and if not, lends its own processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from exec_mp._spread import processor

REQUEST_LATE_S = 200e-6  # a rank has begun by then, be it from a nap
ANSWER_LATE_S = 100e-6  # the driver has seen by then what has come: one thread, which was called last
_PROCESSOR = 35  # field of /proc/.../stat after the state


def scarce(world_size: int) -> bool:
    """Whether the calling thread may use hardly more processors than there are driver and ranks, but several."""
    return 1 < len(os.sched_getaffinity(0)) <= world_size + 1


def hurry(pid: int, tid: int, moving: Callable[[set[int]], None] | None = None) -> bool:
    """Moves thread ``tid`` of process ``pid`` here if it stands in line elsewhere, and leaves it as free as it was.

    Args:
        moving: told before that which processors the thread may use, in case the caller does not live to leave it free;
            an OverflowError says that there is no way to note that, and nothing is done.

    Returns:
        Whether it was moved. Not if it sleeps, may not run here or is gone, or if the system refuses.
    """
    here = processor()
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
        if state != b"R" or int(fields[_PROCESSOR]) == here:
            return False
        allowed = os.sched_getaffinity(tid)
        if here not in allowed:
            return False
        if moving is not None:
            moving(allowed)
        # Both at once: no signal handler comes in between, so nobody is left with one processor.
        list(map(os.sched_setaffinity, (tid, tid), ({here}, allowed)))
    except (OSError, OverflowError):
        return False
    return True
