"""One rank's worker in this process, its calls run one at a time in the order in which they were enqueued.

    enqueue(request) -> Job      under the caller's send order
    run(job)                     by the blocking caller itself, when it is the job's turn
    (otherwise)                  by one thread of our own, started for the first job that needs it

A job is handed on by whoever finishes the one before it, so the lock is held for a few instructions and never while a
worker method runs.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from exec_core import messages
from exec_core.errors import ExecutorError, WorkerError
from exec_core.messages import Reply, Request
from exec_core.worker import as_async_output
from exec_core.wrapper import WorkerWrapper, select_device, settle

_SERVING = "exec-inline"  # name of the thread that runs jobs without a blocking caller


@attrs.define(eq=False)
class Job:
    """One request in the queue.

    Attributes:
        start: asked before it runs; False drops it (a cancelled future).
        done: takes the reply, for a job that the thread runs; None while a blocking caller owns it.
        turn: set when it is the caller's turn, or when the job was dropped; made only when the caller has to wait.
        replies: gets the reply of a blocking call that our own thread makes, in a callback.
    """

    request: Request
    start: Callable[[], bool] | None = None
    done: Callable[[Reply], None] | None = None
    turn: threading.Event | None = None
    dropped: bool = False
    replies: list[Reply] | None = None


class InlineWorker:
    """Runs a `WorkerWrapper` in this process."""

    def __init__(self, wrapper: WorkerWrapper) -> None:
        self._wrapper = wrapper
        self._lock = threading.Lock()  # guards the four below
        self._waiting: deque[Job] = deque()  # jobs whose turn has not come, in order
        self._busy = False  # a job has its turn
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._runner: int | None = None  # thread inside a worker method; written by that thread
        self._current: tuple[Request, float] | None = None  # what it runs and since when; likewise
        self._turns: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # jobs whose turn it is, for the thread
        self._unsettled: queue.SimpleQueue[tuple[Job, Reply] | None] = queue.SimpleQueue()

    @property
    def current(self) -> tuple[Request, float] | None:
        """What runs now, and since when on the monotonic clock."""
        return self._current

    def check_not_inside(self, request: Request) -> None:
        """Refuses a blocking call from inside a worker method, which would wait for itself."""
        if self._runner is not None and self._runner == threading.get_ident():
            method = request.name
            raise ExecutorError(
                f"{method!r} was called from inside a worker method of the same executor: it would never return"
            )

    def enqueue(
        self,
        request: Request,
        start: Callable[[], bool] | None = None,
        done: Callable[[Reply], None] | None = None,
    ) -> Job:
        """Takes the next place in the queue. With ``done`` our thread runs it; without, the caller must `run` it."""
        job = Job(request, start, done)
        if done is None and self._is_serving():
            job.replies = []
            job.done = done = job.replies.append
        with self._lock:
            if self._closed:
                job.dropped = True
                return job
            if done is not None:
                self._start_thread(_SERVING, self._serve)
            if self._busy:
                job.turn = threading.Event() if done is None else None
                self._waiting.append(job)
                return job
            self._busy = True
        if done is not None:
            self._turns.put(job)
        return job

    def run_now(self, request: Request) -> Reply | None:
        """Runs ``request`` on the calling thread if nothing else runs or waits; else None."""
        with self._lock:
            if self._busy or self._closed:
                return None
            self._busy = True
        try:
            reply = self._execute(request)
        finally:
            self._hand_on()
        return reply if reply.value is None else self._settled(request, reply)

    def run(self, job: Job, deadline: float, late: Callable[[Reply], None]) -> Reply | None:
        """Runs ``job`` on the calling thread when its turn comes.

        If that is not before ``deadline``, it is left to our thread, which gives the reply to ``late``, and None is
        returned: the other ranks run it as well, so it cannot be skipped. None too when the worker was closed first.
        """
        if job.replies is not None:
            return self._serve_until(job, job.replies)
        turn = job.turn
        if turn is not None:
            remaining = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
            if not turn.wait(remaining) and self._leave_to_thread(job, late):
                return None
            turn.wait()
        if job.dropped:
            return None
        try:
            reply = self._execute(job.request)
        finally:
            self._hand_on()
        return self._settled(job.request, reply)

    def _leave_to_thread(self, job: Job, late: Callable[[Reply], None]) -> bool:
        with self._lock:
            if job not in self._waiting:
                return False  # its turn came meanwhile
            job.turn, job.done = None, late
            self._start_thread(_SERVING, self._serve)
            return True

    def _execute(self, request: Request) -> Reply:
        self._runner, self._current = threading.get_ident(), (request, time.monotonic())
        reply = self._wrapper.execute(request)  # never raises
        self._runner = self._current = None
        return reply if reply.error is None else self._checked(request, reply)

    def _checked(self, request: Request, reply: Reply) -> Reply:
        """``reply``, whose error is one that callers may see."""
        error = reply.error
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise error  # the user's Ctrl-C, not the worker's
        pid = os.getpid()
        if error is None:
            return reply
        if not isinstance(error, Exception):
            why = WorkerError(self._wrapper.rank, pid, request.name, type(error).__qualname__, str(error))
            why.__cause__ = error
            return Reply(error=why, time_ns=reply.time_ns)
        messages.add_origin(error, self._wrapper.rank, pid, request.name)
        return reply

    def _settled(self, request: Request, reply: Reply) -> Reply:
        """``reply`` with its value, where it is one that is finished late."""
        if reply.error is not None or as_async_output(reply.value) is None:
            return reply
        try:
            return Reply(settle(reply.value, request.wants_value))
        except BaseException as error:
            return self._checked(request, Reply.of_error(error))

    def _hand_on(self) -> None:
        """Gives the turn to the next job."""
        with self._lock:
            if not self._waiting:
                self._busy = False
                return
            job = self._waiting.popleft()
        if job.done is not None:
            self._turns.put(job)
        elif job.turn is not None:
            job.turn.set()

    def _serve(self) -> None:
        select_device(self._wrapper.context)
        while (job := self._turns.get()) is not None:
            self._serve_one(job)

    def _serve_one(self, job: Job) -> None:
        reply = None
        if job.start is None or job.start():
            reply = self._execute(job.request)
        self._hand_on()
        if reply is None or job.done is None:
            return
        if job.replies is None and as_async_output(reply.value) is not None:
            with self._lock:
                self._start_thread("exec-inline-output", self._settle_outputs)
            self._unsettled.put((job, reply))
        else:
            job.done(self._settled(job.request, reply))

    def _is_serving(self) -> bool:
        return any(t is threading.current_thread() and t.name == _SERVING for t in self._threads)

    def _serve_until(self, job: Job, replies: list[Reply]) -> Reply | None:
        """A callback on our thread makes a blocking call: the jobs before it are this thread's to run, too."""
        while not replies and not job.dropped:
            turn = self._turns.get()
            if turn is None:  # closing
                self._turns.put(None)
                job.dropped = True
            else:
                self._serve_one(turn)
        return replies[0] if replies else None

    def _settle_outputs(self) -> None:
        select_device(self._wrapper.context)
        while (item := self._unsettled.get()) is not None:
            job, reply = item
            if job.done is not None:
                job.done(self._settled(job.request, reply))

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        if not any(thread.name == name for thread in self._threads):
            thread = threading.Thread(target=target, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def drop_waiting(self) -> None:
        """Takes no more jobs, and drops those whose turn has not come."""
        with self._lock:
            self._closed = True
            dropped = list(self._waiting)
            self._waiting.clear()
        for job in dropped:
            job.dropped = True
            if job.turn is not None:
                job.turn.set()

    def close(self, deadline: float) -> bool:
        """Drops what waits, and ends the threads by ``deadline``. False when a worker method is still running then."""
        self.drop_waiting()
        self._turns.put(None)
        self._unsettled.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
        while self._busy and self._runner != threading.get_ident() and time.monotonic() < deadline:
            time.sleep(0.001)  # another thread's blocking call; nothing signals its end to a closer
        return not self._busy


class Deadlines:
    """Calls ``expire(item)`` for items whose deadline passes, on one thread that runs only while there are any."""

    def __init__(self, expire: Callable[[Any], None]) -> None:
        self._expire = expire
        self._changed = threading.Condition()  # guards the three below
        self._items: dict[Any, float] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, item: Any, deadline: float) -> None:
        with self._changed:
            sooner = deadline < min(self._items.values(), default=float("inf"))
            self._items[item] = deadline
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._watch, name="exec-deadlines", daemon=True)
                self._thread.start()
            elif sooner:
                self._changed.notify()

    def discard(self, item: Any) -> None:
        with self._changed:
            self._items.pop(item, None)

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                due = [item for item, deadline in self._items.items() if deadline <= now]
                for item in due:
                    del self._items[item]
                if not due:
                    soonest = min(self._items.values(), default=None)
                    self._changed.wait(None if soonest is None else soonest - now)
            for item in due:
                self._expire(item)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
