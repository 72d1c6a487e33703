"""Starting an executor, phase by phase, each with a limit that counts from the last sign of progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exec_core.calls import Call, deadline_after
from exec_core.errors import ExecutorFailedError, RpcTimeoutError, WorkerDiedError, WorkerStartupError


class Phases:
    """The calls that make workers ready.

    Args:
        send: runs a call on the workers, a ``call_type``.
        ranks: all of them.
        timeout_s: for a phase to be over, or for a rank to report that it has come further; None: no limit.
    """

    def __init__(
        self, send: Callable[[Call], Any], call_type: type[Call], ranks: tuple[int, ...], timeout_s: float | None
    ) -> None:
        self._send, self._call_type, self._ranks, self._timeout_s = send, call_type, ranks, timeout_s
        self._running: Call | None = None  # set by the thread that starts; its deadline is moved by `progress`
        self._reports: dict[int, tuple[int, int, str]] = {}  # the last one of each rank; by one thread at a time

    def run(self, phase: str, args: tuple[Any, ...] = (), max_concurrent: int | None = None) -> None:
        """Runs ``phase`` on all ranks.

        Raises:
            WorkerStartupError: naming the first rank to fail, with the original error as cause.
        """
        deadline = deadline_after(self._timeout_s)
        call = self._call_type(
            phase, args, ranks=self._ranks, timeout_s=self._timeout_s, deadline=deadline, max_concurrent=max_concurrent
        )
        self._running = call
        try:
            self._send(call)
        except RpcTimeoutError as error:
            first = error.pending_ranks[0] if error.pending_ranks else None
            raise WorkerStartupError(first, phase, f"{self._late(error.timeout_s)}: {error}") from error
        except WorkerDiedError as error:
            raise died(error, phase) from error
        except ExecutorFailedError as error:
            if not isinstance(error.__cause__, WorkerDiedError):
                raise
            raise died(error.__cause__, phase) from error.__cause__
        except Exception as error:
            if call.failed is None:
                raise
            rank, pid = call.failed
            why = f"{type(error).__name__}: {error}"
            raise WorkerStartupError(rank, phase, why, pid) from error
        finally:
            self._running = None
            self._reports.clear()

    def _late(self, timeout_s: float) -> str:
        limit = f"{timeout_s:g} s (RpcConfig.startup_timeout_s)"
        if not self._reports:
            return f"not done after {limit}"
        reports = ", ".join(f"rank {r}: {d} of {t} {w}" for r, (d, t, w) in sorted(self._reports.items()))
        return f"no progress for {limit}; the last was {reports}"

    def progress(self, rank: int, done: int, total: int, what: str) -> None:
        """A rank reports where it is. That it has come further, or to something else, starts the limit anew."""
        call, report = self._running, (done, total, what)
        if call is not None and self._reports.get(rank) != report:
            self._reports[rank] = report
            call.deadline = deadline_after(self._timeout_s)


def died(error: WorkerDiedError, phase: str) -> WorkerStartupError:
    """What a worker's end during the start is to the caller."""
    return WorkerStartupError(error.rank, phase, error.described(), error.pid)
