"""What /proc says about a process."""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

_PF_EXITING = 0x4  # of the flags in /proc/<pid>/stat, from the kernel's sched.h


class Stat(NamedTuple):
    """One process now.

    Attributes:
        state: letter as in ps; ``Z`` is a zombie, ``T`` stopped by a signal, ``t`` by a debugger.
        parent: pid of its parent.
        exiting: the kernel is taking it down; its end is reported once its memory is freed.
    """

    state: str
    parent: int
    exiting: bool

    @property
    def stopped(self) -> bool:
        return self.state in "Tt"


def stat(pid: int) -> Stat | None:
    """The process with this pid, None when there is none, or /proc belongs to another PID namespace than ours."""
    if not _is_ours():
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    state = fields[0].decode()
    return Stat(state, int(fields[1]), state in "ZX" or bool(int(fields[6]) & _PF_EXITING))


def children() -> list[int]:
    """Pids of this process's children, of which it has one thread."""
    try:
        with open(f"/proc/self/task/{threading.get_native_id()}/children", "rb") as file:
            return [int(pid) for pid in file.read().split()] if _is_ours() else []
    except OSError:  # a kernel built without it
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if (found := stat(pid)) is not None and found.parent == os.getpid()]


def _is_ours() -> bool:
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False
