"""The execution loop: ranks that are no TP drivers stay in a loop of their own and get each step from their driver.

Then a step is sent to the TP drivers only, and each hands it to its group by a broadcast. Errors come from two sides:
from the drivers, as replies to the step, and from the other ranks, as the end of the loop.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from exec_core.errors import ExecutorBusyError, ExecutorError

if TYPE_CHECKING:
    from exec_core.executor import Executor


class ExecutionLoop:
    """Starts, feeds and ends the loop of one executor.

    ``_ended`` is the future of the call that all looping ranks are in; it is set by the thread that starts the loop and
    cleared by whichever thread sees it end. ``_steps`` are the steps in flight; whoever removes one finishes it.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._ended: Future[Any] | None = None
        self._steps: dict[Future[Any], bool] = {}  # whether it ends the loop

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
        if others:
            ended.add_done_callback(self._loop_done)
        return ended

    def step(self, request: Any) -> Future[Any]:
        """Sends one step to the drivers; None ends the loop, and is done when all ranks have left it."""
        executor, step = self._executor, Future[Any]()
        step.set_running_or_notify_cancel()
        if self._ended is None:
            step.set_result(None)
            return step
        self._steps[step] = request is None
        drivers = range(0, executor.world_size, executor.config.parallel.tensor_parallel_size)
        try:
            driven = executor.submit_step("drive_execution_loop", request, drivers)
        except BaseException:
            self._steps.pop(step, None)
            raise
        # Ending it means waiting for the other ranks, unless there are none or the drivers cannot tell them.
        driven.add_done_callback(functools.partial(self._driven, step, request is None))
        if self._ended is None:  # it has ended in the meantime, and its callback did not see this step
            self._finish(step, ExecutorError("the execution loop ended before this step"))
        return step

    def _driven(self, step: Future[Any], ends: bool, driven: Future[Any]) -> None:
        ended, error = self._ended, driven.exception()
        if ends and error is None and ended is not None and not ended.done():
            return
        if ends:
            self._ended = None
        self._finish(step, error, None if error is not None or ends else driven.result())

    def _loop_done(self, ended: Future[Any]) -> None:
        self._ended = None
        error = ended.exception()
        for step, ends in list(self._steps.items()):
            if ends or error is not None:
                self._finish(step, error)

    def _finish(self, step: Future[Any], error: BaseException | None, value: Any = None) -> None:
        if self._steps.pop(step, None) is None:  # the other side was first
            return
        if error is not None:
            step.set_exception(error)
        else:
            step.set_result(value)
