"""The group of one worker that an SPMD rank has, and its execution loop."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from exec_core.asynchronous import Room
from exec_core.base import OnProgress
from exec_core.calls import Call
from exec_core.context import WorkerInit
from exec_core.errors import RankDivergenceError
from exec_core.execution_loop import ExecutionLoop
from exec_core.executor import Executor
from exec_core.inprocess import InProcessGroup
from exec_core.messages import Reply
from exec_torchrun._guard import GuardedWrapper
from exec_torchrun._plan import Outcome, Plan


class SpmdGroup(InProcessGroup):
    """This rank's worker, whose calls are those of all ranks of the replica.

    Args:
        gathers: calls return the values of all ranks where they do not say.
    """

    def __init__(
        self, init: WorkerInit, room: Room, progress: OnProgress, wrapper: GuardedWrapper, gathers: bool
    ) -> None:
        super().__init__(init, room, progress, wrapper)
        self._guard = wrapper
        self._gathers = gathers

    @property
    def divergence(self) -> RankDivergenceError | None:
        """What the others did when this rank left them."""
        return self._guard.divergence

    def check(self) -> None:
        """Says so if a rank of the replica is known to be gone."""
        self._guard.check()

    def run(self, call: Call) -> Any:
        assert isinstance(call, Plan)  # the executor's `_call_type`
        call.decide(self._gathers)
        return super().run(call)

    def submit(self, call: Call, wait: bool) -> Future[Any]:
        assert isinstance(call, Plan)  # the executor's `_call_type`
        call.decide(self._gathers)
        return super().submit(call, wait)

    def _outcome(self, call: Call, reply: Reply) -> Any:
        if not isinstance(reply, Outcome):
            return super()._outcome(call, reply)
        if reply.raised is not None:
            call.failed = reply.failed
            error, reply.raised = reply.raised, None
            try:
                raise error
            finally:
                del error
        return call.result(reply.values)

    def close(self, error: BaseException, deadline: float) -> None:
        self._guard.leave_by = deadline
        super().close(error, deadline)
        self._guard.disconnect()


class SpmdLoop(ExecutionLoop):
    """The execution loop where every rank's own program makes the steps: nobody has to be kept in a loop for them."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self._ended: Future[Any] = Future()  # of the loop that runs, or ran last

    def start(self) -> Future[Any]:
        self._executor.collective_rpc("start_worker_execution_loop", ranks=[])  # on nobody: raises if it is not open
        with self._lock:
            if self.running:
                raise self._busy("start_worker_execution_loop", "the loop runs already")
            self.running, self._ended = True, Future()
        self._ended.set_running_or_notify_cancel()
        return self._ended

    def step(self, request: Any) -> Future[Any]:
        if request is None:
            return self._end()
        return self._executor.submit_step("execute_model", request, range(self._executor.world_size))

    async def step_async(self, request: Any) -> Future[Any]:
        if request is None:
            return self._end()
        return await self._executor.submit_step_async("execute_model", request, range(self._executor.world_size))

    def _end(self) -> Future[Any]:
        step: Future[Any] = Future()
        with self._lock:
            running, self.running = self.running, False
        if running:
            self._ended.set_result([])
        step.set_result(None)
        return step
