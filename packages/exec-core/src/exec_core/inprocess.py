"""A group of one worker that lives in this process: the common part of the backends that start no processes.

run       the calling thread runs the worker's method, in its turn
submit    a thread of our own does; the future's deadline is watched by another
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from exec_core import private
from exec_core.asynchronous import Room
from exec_core.calls import Call
from exec_core.context import WorkerInit
from exec_core.deadlines import Deadlines
from exec_core.errors import ExecutorBusyError, ExecutorClosedError, RpcTimeoutError
from exec_core.group import WorkerInfo
from exec_core.inline import InlineWorker, Job
from exec_core.messages import Reply
from exec_core.wrapper import WorkerWrapper


class InProcessGroup:
    """Runs the worker of one rank in the caller's process.

    A method that runs cannot be interrupted: a blocking call past its deadline returns when the method does, with its
    value.

    Args:
        init: how to build the worker.
        room: told when a call has ended.
        progress: ``fn(rank, done, total, what)``.
        wrapper: what runs the worker, where that is not a `WorkerWrapper` of its own.
    """

    def __init__(
        self,
        init: WorkerInit,
        room: Room,
        progress: Callable[[int, int, int, str], None],
        wrapper: WorkerWrapper | None = None,
    ) -> None:
        self.inits = [init]
        self._rank = init.rank
        self._limit = init.config.max_in_flight
        self._room = room
        self._lock = threading.Lock()  # guards _pending
        self._pending: dict[Future[Any], Call] = {}
        self._late: deque[Call] = deque()  # given up by their callers, and still to run or running
        self._deadlines = Deadlines(self._expire)
        self._wrapper = wrapper or WorkerWrapper(init.rank, lambda *reported: progress(init.rank, *reported))
        self._wrapper.update_environment_variables(init.config.env_of_rank(init.rank))
        self._inline = InlineWorker(self._wrapper)

    def run(self, call: Call) -> Any:
        if not call.ranks:
            return call.result([])
        now = self._inline.run_now(call)
        return self._run_in_turn(call) if now is None else self._outcome(call, now)

    def _run_in_turn(self, call: Call) -> Any:
        self._inline.check_not_inside(call)
        job = Job(call)
        try:
            self._inline.enqueue(job)
            reply = self._inline.run(job, call.deadline, late=_ignore)
        except BaseException:
            self._inline.leave(job, late=_ignore)
            raise
        if reply is None:
            if job.dropped:
                raise ExecutorClosedError("the executor was shut down", call.name)
            raise self._timed_out(call, "an earlier call is still running")
        return self._outcome(call, reply)

    def _outcome(self, call: Call, reply: Reply) -> Any:
        if reply.error is not None:
            call.failed = self._rank, os.getpid()
            # Raised, it refers to this frame and its callers', which have the reply. Without a cycle, what the worker held
            # where it failed is free when the error is: the memory of a step for which that was too little, say.
            error, reply.error = reply.error, None
            try:
                raise error
            finally:
                del error
        values = [reply.value] if call.reply_ranks else []
        return values if call.aggregate is None else call.aggregate(values)

    def submit(self, call: Call, wait: bool) -> Future[Any]:
        future: Future[Any] = Future()
        if not call.ranks:
            future.set_result(call.result([]))
            return future
        job = Job(call, functools.partial(self._start, future), functools.partial(self._done, future, call))
        try:
            self._take_place(future, call, wait)
            self._inline.enqueue(job)
            if call.timeout_s is not None:
                self._deadlines.add(future, call.deadline)
        except BaseException:
            if not self._inline.leave(job, late=_ignore):
                self._forget(future)
            raise
        if job.dropped and self._forget(future):
            raise ExecutorClosedError("the executor was shut down", call.name)
        return future

    def _start(self, future: Future[Any]) -> bool:
        if future not in self._pending:  # timed out while it waited for its turn
            return True  # it runs all the same, as a sent call does on any backend
        if future.set_running_or_notify_cancel():
            return True
        self._forget(future)
        return False

    def _done(self, future: Future[Any], call: Call, reply: Reply) -> None:
        if call in self._late:
            self._late.remove(call)
        if not self._forget(future):
            return
        try:
            value = self._outcome(call, reply)
        except BaseException as error:
            future.set_exception(error)
            del future, call  # likewise
        else:
            future.set_result(value)

    def _take_place(self, future: Future[Any], call: Call, wait: bool) -> None:
        while True:
            with self._lock:
                in_flight = len(self._pending)
                if in_flight < self._limit:
                    self._pending[future] = call
                    return
            if not wait or time.monotonic() >= call.deadline:
                raise ExecutorBusyError(
                    call.name, "no room", in_flight, self._limit, "wait for a call, or raise RpcConfig.max_in_flight"
                )
            time.sleep(0.001)

    def _forget(self, future: Future[Any]) -> bool:
        """Whether ``future`` was pending; it is now the caller's to finish."""
        with self._lock:
            known = self._pending.pop(future, None) is not None
        if known:
            self._deadlines.discard(future)
            self._room.made()
        return known

    def _expire(self, future: Future[Any]) -> None:
        call = self._pending.get(future)
        if call is not None and self._forget(future):
            self._late.append(call)
            self._end(future, self._timed_out(call))

    def _timed_out(self, call: Call, why: str = "") -> RpcTimeoutError:
        pids = {self._rank: os.getpid()}
        return RpcTimeoutError(call.name, call.timeout_s or 0.0, (), call.ranks, why=why, pids=pids)

    @staticmethod
    def _end(future: Future[Any], error: BaseException) -> None:
        if future.running() or future.set_running_or_notify_cancel():
            future.set_exception(error)

    def infos(self) -> list[WorkerInfo]:
        current = self._inline.current
        late = next(iter(self._late), None)  # it may not have its turn yet
        if current is None and late is not None:
            current = late, late.deadline
        if current is None:
            return [WorkerInfo(self._rank, os.getpid(), "idle")]
        request, since = current
        return [WorkerInfo(self._rank, os.getpid(), "busy", request.name, time.monotonic() - since, late is not None)]

    def close(self, error: BaseException, deadline: float) -> None:
        self._inline.drop_waiting()
        with self._lock:
            futures = list(self._pending)
        for future in futures:
            if self._forget(future):
                self._end(future, error)
        self._deadlines.close()
        if self._inline.close(deadline):
            try:
                self._wrapper.shutdown()
            finally:
                private.sweep(self.inits[0].private_root)  # this rank's alone: each has a driver of its own
        elif self._wrapper.context is not None:
            self._wrapper.context.log.warning(
                "a worker method is still running in this process; its worker is not shut down"
            )


def _ignore(reply: Reply) -> None:
    """Nobody waits for it any more."""
