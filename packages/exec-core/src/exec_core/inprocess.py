"""Executors whose only worker lives in this process: the common part of exec-uniproc and exec-torchrun.

    _run      the calling thread runs the worker's method, in its turn
    _submit   a thread of our own does; the future's deadline is watched by another
"""

from __future__ import annotations

import abc
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from exec_core.calls import Call
from exec_core.errors import ExecutorBusyError, ExecutorClosedError, RpcTimeoutError
from exec_core.executor import Executor, WorkerInfo
from exec_core.inline import Deadlines, InlineWorker
from exec_core.messages import Failure, Reply
from exec_core.worker import WorkerInit, WorkerWrapper


class InProcessExecutor(Executor, abc.ABC):
    """Runs the worker of one rank in the caller's process. A subclass says which, by `_worker_init`.

    A method that runs cannot be interrupted: a blocking call past its deadline returns when the method does, with its value.
    """

    _inline: InlineWorker | None = None
    _wrapper: WorkerWrapper | None = None

    @abc.abstractmethod
    def _worker_init(self) -> WorkerInit:
        """How to build the worker of this process. May raise `ConfigError` or `DeviceError`."""

    def _launch(self, deadline: float) -> Sequence[WorkerInit]:
        init = self._worker_init()
        self._rank = init.rank
        self._pending: dict[Future[Any], Call] = {}  # guarded by _pending_lock
        self._pending_lock = threading.Lock()
        self._deadlines = Deadlines(self._expire)
        self._wrapper = WorkerWrapper(init.rank, lambda *progress: self._report_progress(init.rank, *progress))
        self._wrapper.update_environment_variables(self._config.env_of_rank(init.rank))
        self._inline = InlineWorker(self._wrapper)
        return [init]

    def _open(self, call: Call) -> InlineWorker:
        inline = self._inline
        if inline is None:
            raise ExecutorClosedError(f"the executor is {self.state.value}", call.name)
        return inline

    def _run(self, call: Call) -> Any:
        inline = self._open(call)
        inline.check_not_inside(call.name)
        if not call.ranks:
            return call.result([])
        job = inline.enqueue(call.request)
        reply = inline.run(job, call.deadline, late=lambda reply: None)
        if reply is None:
            if job.dropped:
                raise ExecutorClosedError("the executor was shut down", call.name)
            raise RpcTimeoutError(call.name, call.timeout_s or 0.0, (), call.ranks, why="an earlier call is still running")
        return self._outcome(call, reply)

    def _outcome(self, call: Call, reply: Reply) -> Any:
        if reply.error is not None:
            call.failure = Failure(self._rank, os.getpid(), reply.error, reply.time_ns)
            raise reply.error
        return call.result([reply.value] if call.reply_ranks else [])

    def _submit(self, call: Call, wait: bool) -> Future[Any]:
        inline = self._open(call)
        future: Future[Any] = Future()
        if not call.ranks:
            future.set_result(call.result([]))
            return future
        self._take_place(future, call, wait)

        def done(reply: Reply) -> None:
            if self._forget(future):
                try:
                    value = self._outcome(call, reply)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(value)

        def start() -> bool:
            with self._pending_lock:
                live = future in self._pending
            return live and (future.set_running_or_notify_cancel() or self._drop_cancelled(future))

        job = inline.enqueue(call.request, start, done)
        if job.dropped and self._forget(future):
            raise ExecutorClosedError("the executor was shut down", call.name)
        if call.timeout_s is not None:
            self._deadlines.add(future, call.deadline)
        return future

    def _take_place(self, future: Future[Any], call: Call, wait: bool) -> None:
        limit = self._config.max_in_flight
        while True:
            with self._pending_lock:
                in_flight = len(self._pending)
                if in_flight < limit:
                    self._pending[future] = call
                    return
            if not wait or time.monotonic() >= call.deadline:
                raise ExecutorBusyError(
                    call.name, "no room", in_flight, limit, "wait for a call, or raise RpcConfig.max_in_flight"
                )
            time.sleep(0.001)

    def _drop_cancelled(self, future: Future[Any]) -> bool:
        self._forget(future)
        return False

    def _forget(self, future: Future[Any]) -> bool:
        """Whether ``future`` was pending; it is now the caller's to finish."""
        with self._pending_lock:
            known = self._pending.pop(future, None) is not None
        if known:
            self._deadlines.discard(future)
            self._room.made()
        return known

    def _expire(self, future: Future[Any]) -> None:
        call = self._pending.get(future)
        if call is not None and self._forget(future):
            self._end(future, RpcTimeoutError(call.name, call.timeout_s or 0.0, (), call.ranks))

    @staticmethod
    def _end(future: Future[Any], error: BaseException) -> None:
        if future.running() or future.set_running_or_notify_cancel():
            future.set_exception(error)

    def _teardown(self, error: BaseException, deadline: float) -> None:
        inline, wrapper, self._inline, self._wrapper = self._inline, self._wrapper, None, None
        if inline is None or wrapper is None:
            return
        with self._pending_lock:
            futures = list(self._pending)
        idle = inline.close(0.0 if not futures else time.monotonic())
        for future in futures:
            if self._forget(future):
                self._end(future, error)
        self._deadlines.close()
        if not idle and not inline.close(deadline):
            self._log.warning("a worker method is still running in this process; its worker is not shut down")
            return
        wrapper.shutdown()

    def _worker_infos(self) -> list[WorkerInfo]:
        inline = self._inline
        if inline is None:
            return []
        current = inline.current
        if current is None:
            return [WorkerInfo(self._rank, os.getpid(), "idle")]
        return [WorkerInfo(self._rank, os.getpid(), "busy", current[0], time.monotonic() - current[1])]
