"""One rank's worker in this process, its calls run one at a time in the order in which they were enqueued.

    enqueue(job)     under the caller's send order
    run(job)         by the blocking caller itself, when it is the job's turn
    leave(job)       by a caller that Ctrl-C has interrupted, wherever in the two above
    (otherwise)      by one thread of our own, started for the first job that needs it

The turn is taken by `dict.setdefault`, one step and no lock. Whoever gives it up looks then whether a job waits, and
whoever has put a job into the queue looks then whether the turn is free: one of the two sees the other. The lock orders
those who wait, and is never held while a worker method runs. What must not be cut in two by a signal stands between two
calls, where none comes in, or may be done twice.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from threading import get_ident
from time import monotonic

import attrs

from exec_core import messages
from exec_core.errors import ExecutorError, WorkerError
from exec_core.messages import Reply, Request
from exec_core.worker import as_async_output
from exec_core.wrapper import WorkerWrapper, select_device, settle

_SERVING = "exec-inline"  # name of the thread that runs jobs without a blocking caller
_HOLDER = "holder"  # the only key of `InlineWorker._turn`


@attrs.define(eq=False)
class Job:
    """One request in the queue.

    Attributes:
        start: asked before it runs; False drops it (a cancelled future).
        done: takes the reply, for a job that the thread runs; None while a blocking caller owns it.
        turn: released when it is the caller's turn, or when the job was dropped; made only when the caller has to wait.
        replies: gets the reply of a blocking call that our own thread makes, in a callback.
        begun: its caller runs it, or has run it.
        given: our thread has it.
    """

    request: Request
    start: Callable[[], bool] | None = None
    done: Callable[[Reply], None] | None = None
    turn: threading.Lock | None = None
    dropped: bool = False
    replies: list[Reply] | None = None
    begun: bool = False
    given: bool = False


class InlineWorker:
    """Runs a `WorkerWrapper` in this process."""

    def __init__(self, wrapper: WorkerWrapper) -> None:
        self._wrapper = wrapper
        self._turn: dict[str, object] = {}  # its holder, if it is taken: a job, or the request of `run_now`
        self._lock = threading.Lock()  # guards the three below
        self._waiting: deque[Job] = deque()  # jobs whose turn has not come, in order; looked at without it, too
        self._threads: dict[str, threading.Thread] = {}  # by name; written without it too, by single steps
        self._closed = False  # set before the turn is looked at, and looked at after the turn is taken
        self._current: tuple[Request, float, int] | None = None  # what runs, since when, in which thread
        self._turns: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # jobs whose turn it is, for the thread
        self._unsettled: queue.SimpleQueue[tuple[Job, Reply] | None] = queue.SimpleQueue()

    @property
    def current(self) -> tuple[Request, float] | None:
        """What runs now, and since when on the monotonic clock."""
        current = self._current
        return None if current is None else current[:2]

    def check_not_inside(self, request: Request) -> None:
        """Refuses a blocking call from inside a worker method, which would wait for itself."""
        if self._is_inside():
            method = request.name
            raise ExecutorError(
                f"{method!r} was called from inside a worker method of the same executor: it would never return"
            )

    def _is_inside(self) -> bool:
        current = self._current
        return current is not None and current[2] == get_ident()

    def enqueue(self, job: Job) -> None:
        """Takes the next place in the queue. With ``done`` our thread runs it; without, the caller must `run` or `leave` it."""
        if job.done is None and self._is_serving():
            job.replies = []
            job.done = job.replies.append
        with self._lock:
            if self._closed:
                job.dropped = True
                return
            if job.done is not None:
                self._start_thread(_SERVING, self._serve)
            waits = bool(self._waiting) or self._turn.setdefault(_HOLDER, job) is not job
            if waits:
                if job.done is None:
                    job.turn = threading.Lock()
                    job.turn.acquire()
                self._waiting.append(job)
        if waits:
            self._give_turn()
        elif job.done is not None:
            job.given = True
            self._turns.put(job)

    def run_now(self, request: Request) -> Reply | None:
        """Runs ``request`` on the calling thread if nothing else runs or waits; else None."""
        try:
            if self._turn.setdefault(_HOLDER, request) is not request:
                return None
            if self._waiting or self._closed:
                self._hand_on(request)
                return None
            self._current = request, monotonic(), get_ident()
            reply = self._wrapper.execute(request)
            if reply.error is not None:
                reply = self._checked(request, reply)
            self._current = None
            del self._turn[_HOLDER]
            if self._waiting:
                self._give_turn()
        except BaseException:
            if self._turn.get(_HOLDER) is request:
                self._current = None
            self._hand_on(request)
            raise
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
            remaining = -1 if deadline == float("inf") else min(max(0.0, deadline - monotonic()), threading.TIMEOUT_MAX)
            if not turn.acquire(timeout=remaining):
                with self._lock:
                    if job in self._waiting:
                        self._leave_waiting(job, late)
                        return None
                turn.acquire()  # its turn came meanwhile
        if job.dropped:
            return None
        job.begun = True
        reply = self._execute(job.request)
        self._hand_on(job)
        return self._settled(job.request, reply)

    def _leave_waiting(self, job: Job, late: Callable[[Reply], None]) -> None:
        """Under the lock: leaves a job that waits for its turn to our thread."""
        if job.done is None:
            job.turn, job.done = None, late
        self._start_thread(_SERVING, self._serve)

    def leave(self, job: Job, late: Callable[[Reply], None]) -> bool:
        """For a caller that was interrupted in `enqueue` or `run`. Twice is fine.

        A job that has not begun is left to our thread, as in `run`. False for one that has never been in the queue.
        """
        with self._lock:
            waits = job in self._waiting
            if waits:
                self._leave_waiting(job, late)
            elif self._turn.get(_HOLDER) is job and not job.begun and not job.given:
                job.done = job.done or late
                self._start_thread(_SERVING, self._serve)
                job.given = True
                self._turns.put(job)
        if job.begun:
            self._hand_on(job)
        else:
            self._give_turn()
        return waits or job.begun or job.given

    def _execute(self, request: Request) -> Reply:
        try:
            self._current = request, monotonic(), get_ident()
            reply = self._wrapper.execute(request)
        finally:
            self._current = None
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

    def _hand_on(self, turn: object) -> None:
        """Gives up the turn, if ``turn`` still has it, and gives it to the next job. Twice is fine."""
        if self._turn.get(_HOLDER) is turn:
            del self._turn[_HOLDER]
        if self._waiting:
            self._give_turn()

    def _give_turn(self) -> None:
        """Gives the turn to the next job, if it is free and one waits. Twice is fine."""
        job = None
        try:
            with self._lock:
                if self._waiting and self._turn.setdefault(_HOLDER, self._waiting[0]) is self._waiting[0]:
                    job = self._waiting[0]
                    del self._waiting[0]
        finally:
            if job is not None:
                if job.done is not None:
                    job.given = True
                    self._turns.put(job)
                elif job.turn is not None:
                    job.turn.release()

    def _serve(self) -> None:
        select_device(self._wrapper.context)
        while (job := self._turns.get()) is not None:
            self._serve_one(job)
            del job  # what it holds does not outlive it

    def _serve_one(self, job: Job) -> None:
        reply = None
        if job.start is None or job.start():
            reply = self._execute(job.request)
        self._hand_on(job)
        if reply is None or job.done is None:
            return
        if job.replies is None and as_async_output(reply.value) is not None:
            with self._lock:
                self._start_thread("exec-inline-output", self._settle_outputs)
            self._unsettled.put((job, reply))
        else:
            job.done(self._settled(job.request, reply))
        del job, reply  # an error refers to the frames of who called: its future is not to be known here

    def _is_serving(self) -> bool:
        return self._threads.get(_SERVING) is threading.current_thread()

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
            del item, job, reply

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        if name not in self._threads:
            thread = threading.Thread(target=self._serve_as, args=(name, target), name=name, daemon=True)
            thread.start()
            self._threads.setdefault(name, thread)

    def _serve_as(self, name: str, target: Callable[[], None]) -> None:
        """Runs ``target`` unless another thread does: one whose starting was interrupted may have started all the same."""
        thread = threading.current_thread()
        if self._threads.setdefault(name, thread) is thread:
            target()

    def drop_waiting(self) -> None:
        """Takes no more jobs, and drops those whose turn has not come."""
        with self._lock:
            self._closed = True
            dropped = list(self._waiting)
            self._waiting.clear()
        for job in dropped:
            job.dropped = True
            self._hand_on(job)  # which it has where Ctrl-C has cut `_give_turn` short
            if job.turn is not None:
                job.turn.release()

    def close(self, deadline: float) -> bool:
        """Drops what waits, and ends the threads by ``deadline``. False when a worker method is still running then."""
        self.drop_waiting()
        self._turns.put(None)
        self._unsettled.put(None)
        for thread in list(self._threads.values()):
            if thread is not threading.current_thread():
                thread.join(None if deadline == float("inf") else max(0.0, deadline - monotonic()))
        while self._turn and not self._is_inside() and monotonic() < deadline:
            time.sleep(0.001)  # another thread's blocking call; nothing signals its end to a closer
        return not self._turn
