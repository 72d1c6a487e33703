"""The execution loop: ranks that are no TP drivers stay in a loop of their own and get each step from their driver.

Then a step is sent to the TP drivers only, and each hands it to its group by a broadcast. Errors come from two sides: from
the drivers, as replies to the step, and from the other ranks, as the end of the loop.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

from exec_core.errors import ExecutorBusyError

if TYPE_CHECKING:
    from exec_core.executor import Executor


class ExecutionLoop:
    """Starts, feeds and ends the loop of one executor.

    ``_ended`` is the future of the call that all looping ranks are in; it is set by the thread that starts the loop and
    cleared by whichever thread sees it end.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._ended: Future[Any] | None = None

    @property
    def running(self) -> bool:
        return self._ended is not None

    def refuse(self, method: str, ranks: tuple[int, ...]) -> None:
        """Raises `ExecutorBusyError` when one of ``ranks`` is in the loop: the call would wait for the loop's end."""
        size = self._executor.config.parallel.tensor_parallel_size
        looping = [rank for rank in ranks if rank % size]
        if self.running and looping:
            raise ExecutorBusyError(
                method, f"ranks {looping} are in the execution loop", 1, self._executor.config.max_in_flight,
                "call stop_remote_worker_execution_loop() first",
            )  # fmt: skip

    def start(self) -> Future[Any]:
        executor = self._executor
        size = executor.config.parallel.tensor_parallel_size
        others = [rank for rank in range(executor.world_size) if rank % size]
        if self.running:
            raise ExecutorBusyError(
                "start_worker_execution_loop", "the loop runs already", 1, executor.config.max_in_flight,
                "call stop_remote_worker_execution_loop() first",
            )  # fmt: skip
        ended = executor.collective_rpc("start_worker_execution_loop", float("inf"), ranks=others, non_block=True)
        self._ended = ended
        return ended

    def step(self, request: Any) -> Future[Any]:
        """Sends one step to the drivers; None ends the loop, and is done when all ranks have left it."""
        executor, ended = self._executor, self._ended
        step: Future[Any] = Future()
        step.set_running_or_notify_cancel()
        if ended is None:
            step.set_result(None)
            return step
        drivers = range(0, executor.world_size, executor.config.parallel.tensor_parallel_size)
        driven = executor.submit_step("drive_execution_loop", request, drivers)

        def driven_done(_: Future[Any]) -> None:
            if request is not None or driven.exception() is not None:
                _copy(driven, step)

        def loop_done(_: Future[Any]) -> None:
            self._ended = None
            if request is None or ended.exception() is not None:
                _copy(ended, step)

        driven.add_done_callback(driven_done)
        ended.add_done_callback(loop_done)
        return step


def _copy(source: Future[Any], target: Future[Any]) -> None:
    with contextlib.suppress(InvalidStateError):  # the other side was first
        if (error := source.exception()) is not None:
            target.set_exception(error)
        else:
            target.set_result(source.result())
