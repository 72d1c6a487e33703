"""The execution loop: ranks that are no TP drivers stay in a loop of their own and get each step from their driver.

    step     sent to the TP drivers only; each hands it to its group by a broadcast and runs it
    None     the same, and all leave their loops

A rank that raises leaves its loop: the steps in flight fail at once, since the drivers may wait for it for ever.
Stopping then has it join the loop once more, for the None that its driver broadcasts, and raises the error unless a
step has.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from exec_core.errors import ExecutorBusyError

if TYPE_CHECKING:
    from exec_core.executor import Executor

_DRIVE = "drive_execution_loop"
_REMEDY = "call stop_remote_worker_execution_loop() first"


class ExecutionLoop:
    """Starts, feeds and ends the loop of one executor.

    ``_lock`` guards what follows it; futures are finished without it.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.running = False  # written under _lock
        self._lock = threading.Lock()
        self._inside: dict[int, Future[Any]] = {}  # each looping rank's call
        self._gone: set[int] = set()  # of these ranks, those that have left for good, as far as is known
        self._steps: set[Future[Any]] = set()  # in flight; whoever removes one finishes it
        self._error: BaseException | None = None  # the first of a rank that has left its loop
        self._raised = False  # a step has raised it
        self._stop: Future[Any] | None = None  # of the step that ends the loop, once it is asked for

    def refuse(self, method: str, ranks: Sequence[int]) -> None:
        """Raises `ExecutorBusyError` when one of ``ranks`` is in the loop: the call would wait for the loop's end."""
        if looping := [rank for rank in ranks if rank in self._inside]:
            raise self._busy(method, f"ranks {looping} are in the execution loop")

    def holds(self, rank: int) -> bool:
        """Whether ``rank`` is in the loop."""
        return rank in self._inside

    def _busy(self, method: str, why: str, remedy: str = _REMEDY) -> ExecutorBusyError:
        return ExecutorBusyError(method, why, len(self._inside), self._executor.config.max_in_flight, remedy)

    def start(self) -> Future[Any]:
        """Sends the ranks that are no TP drivers into the loop; the future is done when all have left it."""
        executor, ended = self._executor, Future[Any]()
        executor.check_open("start_worker_execution_loop")
        ended.set_running_or_notify_cancel()
        with self._lock:
            if self.running:
                raise self._busy("start_worker_execution_loop", "the loop runs already")
            self.running, self._error, self._raised, self._stop = True, None, False, None
        size = executor.config.parallel.tensor_parallel_size
        others = [rank for rank in range(executor.world_size) if rank % size]
        left: list[None] = []
        try:
            for rank in others:
                self._enter(rank).add_done_callback(functools.partial(self._count_out, left, len(others), ended))
        except BaseException:
            if not self._inside:  # else some are in it, and stopping gets them out
                self.running = False
            raise
        if not others:
            ended.set_result([])
        return ended

    def _enter(self, rank: int) -> Future[Any]:
        inside = self._executor.enter_loop(rank)
        with self._lock:
            self._inside[rank] = inside
            self._gone.discard(rank)
        inside.add_done_callback(functools.partial(self._left, rank))
        return inside

    def _enter_again(self, rank: int, left: Future[Any]) -> None:
        """Sends a rank that has left with an error in for the None; once, though who stops and who sees it leave both try.

        Where that is not possible, the executor being down, the rank is gone and the loop's end says why.
        """
        with self._lock:
            if self._inside.get(rank) is not left:
                return
            self._inside[rank] = Future()  # as good as inside: the loop has not ended
            self._gone.discard(rank)
        try:
            self._enter(rank)
        except BaseException as error:
            with self._lock:
                self._inside[rank] = left
                self._gone.add(rank)
                if self._raised or self._error is None:
                    self._error, self._raised = error, False
            self._left_all()
            if not isinstance(error, Exception):  # Ctrl-C
                raise

    @staticmethod
    def _count_out(left: list[None], total: int, ended: Future[Any], inside: Future[Any]) -> None:
        left.append(None)  # atomic
        error = inside.exception()
        if error is not None and not ended.done():
            ended.set_exception(error)
        elif len(left) == total and not ended.done():
            ended.set_result([None] * total)

    def step(self, request: Any) -> Future[Any] | None:
        """Sends one step to the drivers; None ends the loop, and is done when all ranks have left it.

        Returns:
            None: the loop does not run, and nothing was sent.

        Raises:
            ExecutorBusyError: it is being ended; who wants that as well, gets the same future.
        """
        step, is_new = self._begin(request)
        if step is not None and is_new:
            with self._sending(step):
                driven = self._executor.submit_step(_DRIVE, request, self._drivers)
            self._sent(step, request, driven)
        return step

    async def step_async(self, request: Any) -> Future[Any] | None:
        """`step`, for which room is awaited."""
        step, is_new = self._begin(request)
        if step is not None and is_new:
            with self._sending(step):
                driven = await self._executor.submit_step_async(_DRIVE, request, self._drivers)
            self._sent(step, request, driven)
        return step

    @property
    def _drivers(self) -> range:
        return range(0, self._executor.world_size, self._executor.config.parallel.tensor_parallel_size)

    def _begin(self, request: Any) -> tuple[Future[Any] | None, bool]:
        """A step, and whether it is to be sent."""
        step = Future[Any]()
        step.set_running_or_notify_cancel()
        with self._lock:
            if not self.running:
                return None, False
            if self._stop is not None:
                if request is None:
                    return self._stop, False
                raise self._busy("execute_model", "the execution loop is being ended", "wait until it has ended")
            error = self._error if request is not None else None
            if error is None:
                self._steps.add(step)
                self._stop = step if request is None else None
            else:
                self._raised = True
        if error is not None:
            raise error
        return step, True

    @contextlib.contextmanager
    def _sending(self, step: Future[Any]) -> Iterator[None]:
        """An exception means that it was not sent."""
        try:
            yield
        except BaseException:
            with self._lock:
                self._steps.discard(step)
                if self._stop is step:
                    self._stop = None
            raise

    def _sent(self, step: Future[Any], request: Any, driven: Future[Any]) -> None:
        try:
            if request is None:
                for rank, inside in list(self._inside.items()):
                    if inside.done() and inside.exception() is not None:  # without an error it has had its None already
                        self._enter_again(rank, inside)
        finally:  # else whoever stops the loop as well would wait for ever
            driven.add_done_callback(functools.partial(self._driven, step))

    def _driven(self, step: Future[Any], driven: Future[Any]) -> None:
        """The drivers have run a step."""
        error = driven.exception()
        if step is not self._stop:
            self._finish(step, error, None if error is not None else driven.result())
            return
        with self._lock:
            self.running = False
        if error is not None:
            self._finish(step, error)
        else:
            self._left_all()

    def _left(self, rank: int, inside: Future[Any]) -> None:
        """A rank has left its loop."""
        error = inside.exception()
        if error is not None:
            with self._lock:
                self._error = self._error or error
                steps = [step for step in self._steps if step is not self._stop]
                self._raised = self._raised or bool(steps)
            for step in steps:
                self._finish(step, error)
            if self._stop is not None and not self._executor.is_down:
                self._enter_again(rank, inside)  # its driver's None is still to come
                return
        with self._lock:
            if self._inside.get(rank) is inside:
                self._gone.add(rank)
        self._left_all()

    def _left_all(self) -> None:
        """Finishes the step that ends the loop, when its drivers have run it and all ranks have left."""
        with self._lock:
            stop, error = self._stop, None if self._raised else self._error
            if stop is None or self.running or not self._gone.issuperset(self._inside):
                return
            self._inside.clear()
            self._gone.clear()
            self._stop = self._error = None  # what has raised the error has the request of a step
        self._finish(stop, error)

    def _finish(self, step: Future[Any], error: BaseException | None, value: Any = None) -> None:
        with self._lock:
            if step not in self._steps:  # the other side was first
                return
            self._steps.remove(step)
        if error is not None:
            step.set_exception(error)
        else:
            step.set_result(value)
