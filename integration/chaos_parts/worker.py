"""The worker of the chaos program, and the errors that it raises."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from exec_core.testing.workers import EchoWorker


class OddError(Exception):
    """Cannot be loaded again: its constructor takes other arguments than its ``args``."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what} ({code})")


class Bomb:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


class ChaosWorker(EchoWorker):
    """Takes its time to load, and does what it is told.

    Args:
        load_s: seconds that ``load_model`` takes.
    """

    def __init__(self, context: Any, load_s: float = 0.0) -> None:
        super().__init__(context)
        self._load_s = load_s

    def load_model(self) -> None:
        until = time.monotonic() + self._load_s
        while time.monotonic() < until:
            self.context.report_progress(0, 1, "part")
            time.sleep(0.002)

    def digest(self, data: Any) -> tuple[int, str]:
        """The rank, and what tells ``data`` from any other."""
        return self.context.rank, hashlib.sha256(bytes(data)).hexdigest()

    def blob(self, nbytes: int, seed: int) -> bytearray:
        """Bytes that the caller can foretell."""
        return bytearray(bytes([(seed + self.context.rank) % 256])) * nbytes

    def slow(self, seconds: float, rank: int, token: Any) -> tuple[int, Any]:
        """`where`, but ``rank`` is slow."""
        if self.context.rank == rank:
            time.sleep(seconds)
        return self.context.rank, token

    def add_up(self, times: int) -> float:
        """Collectives, ``times`` in a row."""
        import torch
        import torch.distributed as dist

        total = torch.zeros(1)
        for _ in range(times):
            part = torch.ones(1)
            dist.all_reduce(part)
            total += part
        return total.item()

    def odd(self, kind: str) -> Any:
        """Something that is hard to send back."""
        kinds: dict[str, Callable[[], Any]] = {
            "unloadable error": lambda: _raise(OddError("odd", 3)),
            "unpicklable value": threading.Lock,
            "bomb": Bomb,
            "exit": sys.exit,
            "interrupt": lambda: _raise(KeyboardInterrupt()),
            "group": lambda: _raise(ExceptionGroup("odd", [ValueError(1), TypeError(2)])),
        }
        return kinds[kind]()

    def close(self, number: int, rank: int) -> None:
        """Closes a descriptor that is not this method's own."""
        if self.context.rank == rank:
            os.close(number)


def _raise(error: BaseException) -> None:
    raise error
