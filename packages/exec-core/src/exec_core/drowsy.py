"""Keeps the threads of gloo from waking up all the time.

Each looks every 10 ms whether it is to end: with one or several in each of many ranks, that keeps a machine from ever being
idle, and takes caches and processors from who has something to do. What comes on a socket wakes them whatever is said here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_SLACK_NS = 10_000_000  # they look half as often; joining and leaving wait for such a look a time or two
_DOZE_NS = 290_000_000  # a thirtieth as often; destroying a group may take that long for each peer
_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30  # of linux/prctl.h
_GLOO = "gloo_tcp_loop"  # what torch's build of gloo calls them


@contextmanager
def drowsy_threads() -> Iterator[None]:
    """Threads that start meanwhile may sleep past their time-outs a little."""
    prctl = ctypes.CDLL(None).prctl
    own_ns = prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0)
    prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)  # of this thread, and of those that it starts
    try:
        yield
    finally:
        prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(max(0, own_ns)), 0, 0, 0)


def doze() -> None:
    """Threads of gloo that are here may sleep past their time-outs by more: in a process that need not leave its groups soon.

    Only where the system lets this process say so of another thread (CAP_SYS_NICE).
    """
    _allow(_DOZE_NS)


def rouse() -> None:
    """Undoes `doze`, from the next time-out of each thread on: before groups are left, which waits for many in turn."""
    _allow(_SLACK_NS)


def _allow(slack_ns: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):
            with open(f"/proc/self/task/{thread}/comm", encoding="utf-8") as file:
                name = file.read().strip()
            if name == _GLOO:
                with open(f"/proc/{thread}/timerslack_ns", "w", encoding="utf-8") as file:
                    file.write(str(slack_ns))
