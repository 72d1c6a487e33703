"""What is done to the processes: which one, what, and when."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import attrs

ENDING = (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
_NAMES = {signal.SIGSTOP: "SIGSTOP, SIGCONT"}


@attrs.frozen
class Fault:
    """A signal for a process.

    Attributes:
        victim: ``worker``, ``fork server`` or ``driver``.
        choice: which of several, as a number in [0, 1).
        number: the signal; None: nothing is done.
        delay_s: seconds before it.
        stopped_s: seconds from SIGSTOP to SIGCONT.
    """

    victim: str
    choice: float
    number: signal.Signals | None
    delay_s: float
    stopped_s: float = 0.0

    @property
    def ends(self) -> bool:
        """Whether the process does not survive it."""
        return self.number not in {signal.SIGSTOP, None}

    def __str__(self) -> str:
        if self.number is None:
            return "nothing else"
        what = _NAMES.get(self.number, self.number.name)
        return f"{what} to the {self.victim} after {self.delay_s * 1e3:.0f} ms"

    def strike(self, pids: list[int]) -> None:
        """Waits, then sends it to one of ``pids``."""
        time.sleep(self.delay_s)
        if not pids or self.number is None:
            return
        pid = pids[int(self.choice * len(pids))]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, self.number)
            if not self.ends:
                time.sleep(self.stopped_s)
                os.kill(pid, signal.SIGCONT)


def choose(dice: random.Random, victims: tuple[str, ...], within_s: float, *, stops: bool = True) -> Fault:
    """Any fault, at any moment ``within_s`` seconds; without ``stops``, none that stops a process for a while."""
    number = dice.choice([*ENDING, signal.SIGKILL, *([signal.SIGSTOP] if stops else [])])
    delay_s = within_s * dice.random() ** 2  # early more often: starts and calls are short
    return Fault(dice.choice(victims), dice.random(), number, delay_s, dice.random() * 0.3)


def children(pid: int) -> list[int]:
    """Pids of the children of a process."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    return found


def descendants(pid: int) -> list[int]:
    """Pids of its children, and of theirs."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


def fork_server() -> int:
    """Pid of this process's fork server."""
    for pid in children(os.getpid()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"exec_mp._forkserver" in file.read():
                return pid
    raise RuntimeError("this process has no fork server")
