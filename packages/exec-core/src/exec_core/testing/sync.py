"""Waiting for another process without sleeping blindly: gates, and conditions with a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import attrs

T = TypeVar("T")

DEADLINE_S = 30.0  # far beyond anything that works: reaching it is a failure, not a slow machine


def eventually(condition: Callable[[], T], *, deadline_s: float = DEADLINE_S, every_s: float = 0.001) -> T:
    """The first true value of ``condition()``.

    Raises:
        TimeoutError: when there is none within ``deadline_s``.
    """
    until = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"the condition was not met within {deadline_s:g} s")
        time.sleep(every_s)
    return value


@attrs.frozen
class Gate:
    """A gate between processes, as files in a directory: workers wait in it, a test sees who is inside and opens it.

    Attributes:
        directory: an existing one, not shared with another gate.
    """

    directory: str = attrs.field(converter=str)

    def wait(self, rank: int) -> None:
        """In a worker: says that ``rank`` is inside and returns when the gate is open."""
        self._touch(f"entered-{rank}")
        eventually(lambda: os.path.exists(os.path.join(self.directory, "open")))

    def entered(self, ranks: Sequence[int]) -> None:
        """Returns when each of ``ranks`` is inside or has been."""
        eventually(lambda: all(os.path.exists(os.path.join(self.directory, f"entered-{rank}")) for rank in ranks))

    def open(self) -> None:
        """Lets everyone through, from now on."""
        self._touch("open")

    def _touch(self, name: str) -> None:
        with open(os.path.join(self.directory, name), "w", encoding="ascii"):
            pass
