"""What one thread sleeps on until another wakes it, or is woken by where it sleeps on something else."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Wakeup:
    """An event that each `wait` takes back.

    Every method is one operation of a lock, so Ctrl-C comes before it or after it. The operations of `threading.Event`
    are made of several: one that is interrupted leaves it locked for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held: not set
        self._lock.acquire()

    def set(self) -> None:
        """Wakes who waits, or who waits next."""
        try:
            self._lock.release()
        except RuntimeError:  # it is set already
            return

    def wait(self, timeout_s: float | None) -> None:
        """Returns when it is set, or after ``timeout_s``."""
        self._lock.acquire(timeout=-1 if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))

    def clear(self) -> None:
        """Not set any more."""
        self._lock.acquire(blocking=False)


class Nudge:
    """A `Wakeup` for who waits in another way: `set` is ``wake``."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.set = wake
