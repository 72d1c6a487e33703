"""What a backend provides: a group of workers that takes calls."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol, TypeVar

import attrs

from exec_core.calls import Call
from exec_core.context import WorkerInit

C_contra = TypeVar("C_contra", bound=Call, contravariant=True)


@attrs.frozen
class WorkerInfo:
    """One worker as the driver knows it.

    Attributes:
        rank, pid: the worker and its process.
        state: ``idle``, ``busy`` or ``dead``.
        method: the call it is in, or None.
        busy_s: for how long, in seconds; 0.0 when idle.
        timed_out: the caller of ``method`` has given up on it.
    """

    rank: int
    pid: int
    state: Literal["idle", "busy", "dead"]
    method: str | None = None
    busy_s: float = 0.0
    timed_out: bool = False


class WorkerGroup(Protocol[C_contra]):
    """The workers of one generation, as a backend's `Executor._launch` makes them. Its calls are `Executor._call_type`."""

    @property
    def inits(self) -> Sequence[WorkerInit]:
        """How to build each worker."""

    def run(self, call: C_contra) -> Any:
        """Sends ``call``, waits for its ranks, returns ``call.result(values)``, or raises with ``call.failed`` set."""

    def submit(self, call: C_contra, wait: bool) -> Future[Any]:
        """Sends ``call`` and returns its future.

        Raises:
            ExecutorBusyError: without room; at once if not ``wait``, else when the call's deadline has passed.
        """

    def infos(self) -> list[WorkerInfo]:
        """What each rank is doing now, without queueing behind its work."""

    def close(self, error: BaseException, deadline: float) -> None:
        """Fails what is pending with ``error`` and ends all workers by ``deadline``. Twice is fine."""
