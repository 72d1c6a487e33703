"""A peer: one way to have N workers run methods."""

from __future__ import annotations

import abc
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any, ClassVar

from bench.stats import Metrics


class AbsentError(Exception):
    """This peer cannot do that here; the text says why."""


class Peer(abc.ABC):
    """N workers, each with a `bench.work.Work`, and the way to call them. The constructor starts them all.

    Args:
        n: how many workers.
    """

    distribution: ClassVar[str | None] = None  # whose version is reported; None: Python's

    def __init__(self, n: int) -> None:
        self.n = n

    @abc.abstractmethod
    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """Runs a method on all workers and returns their values, or with ``one_reply`` that of the first one only."""

    @abc.abstractmethod
    def in_flight(self, count: int, window: int) -> None:
        """``count`` calls of ``noop`` on all workers, ``window`` of them under way at a time."""

    def step(self, busy_s: float, payload: object, one_reply: bool) -> None:
        """One step of a model: all workers are busy, and all of them answer, or with ``one_reply`` the first one only."""
        self.call("step", busy_s, payload, one_reply=one_reply)

    def measure(self, workload: str, params: Mapping[str, Any]) -> Metrics | None:
        """For a peer that measures by itself: what `bench.workloads` would return. None: the workload calls `call`."""
        return None

    @abc.abstractmethod
    def stop(self) -> None:
        """Ends the workers."""

    @classmethod
    def version(cls) -> str:
        """Of what is measured."""
        if cls.distribution is None:
            return f"Python {platform.python_version()}"
        return f"{cls.distribution} {importlib.metadata.version(cls.distribution)}"
