"""An executor's lifecycle: one state, moved in one place under one lock, and who is told of a failure.

STARTING -> READY -> FAILED -> STARTING (restart)          any of them -> CLOSING -> CLOSED
"""

from __future__ import annotations

import enum
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from exec_core.errors import ExecutorClosedError, ExecutorFailedError


class State(enum.Enum):
    """Where an executor is in its life."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    CLOSING = "closing"
    CLOSED = "closed"


_MOVES = {
    State.STARTING: {State.READY, State.FAILED, State.CLOSING},
    State.READY: {State.FAILED, State.CLOSING},
    State.FAILED: {State.STARTING, State.CLOSING},
    State.CLOSING: {State.CLOSED},
    State.CLOSED: set[State](),
}

FailureCallback = Callable[[BaseException], object]


class Lifecycle:
    """State, failure and generation of one executor.

    Everything is written under ``_lock``, which is never held while calling out. ``state`` may be read without it: a
    reader acts on what was true a moment ago, and the backend decides again under its own lock.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.state = State.STARTING
        self.failure: BaseException | None = None
        self.generation = 0
        self._doomed: BaseException | None = None  # a death during the start, which then must not become READY
        self._told: BaseException | None = None  # the failure that has been told: who comes later hears it at once
        self._callbacks: list[FailureCallback] = []
        self._lock = threading.Lock()
        _lifecycles.add(self)

    def move(self, to: State, failure: BaseException | None = None, told: bool = False) -> bool:
        """Moves to ``to``; False, and nothing happens, when that is not allowed from the present state.

        Args:
            failure: why, for a move to FAILED.
            told: somebody is told of ``failure`` in another way: only callbacks that register later hear of it.
        """
        with self._lock:
            if to not in _MOVES[self.state] or (to is State.READY and self._doomed is not None):
                return False
            self.state = to
            if to is State.FAILED:
                self.failure = failure
                if told:
                    self._told = failure
            elif to is State.STARTING:
                self.failure = self._doomed = None
                self.generation += 1
            return True

    def fail(self, error: BaseException) -> bool:
        """A worker is gone.

        True when this made a READY executor FAILED; a start in progress is kept from succeeding.
        """
        with self._lock:
            if self.state is State.STARTING and self._doomed is None:
                self._doomed = error
        return self.state is State.READY and self.move(State.FAILED, error)

    @property
    def doomed(self) -> BaseException | None:
        """The death that a start in progress has met."""
        return self._doomed

    def check_open(self, method: str | None) -> None:
        """Raises unless a call may be sent now.

        Raises:
            ExecutorClosedError: closing, closed, starting, or used in a forked child of its process.
            ExecutorFailedError: failed, with the failure as cause.
        """
        if self.state is State.READY:
            return
        if os.getpid() != self.pid:
            raise ExecutorClosedError(f"the executor belongs to process {self.pid}, this is a forked child", method)
        failure = self.failure
        if self.state is State.FAILED and failure is not None:
            raise ExecutorFailedError(failure, method) from failure
        raise ExecutorClosedError(f"the executor is {self.state.value}", method)

    def register(self, fn: FailureCallback, log: Any) -> None:
        """``fn`` will run once for each failure; at once, on its own thread, when one has been told already."""
        with self._lock:
            self._callbacks.append(fn)
            late = self.failure if self.failure is not None and self._told is self.failure else None
        if late is not None:
            _on_own_thread(lambda: _run([fn], late, log))

    def notify(self, error: BaseException, log: Any, then: Callable[[], None]) -> None:
        """Runs the callbacks with ``error``, then ``then``, on a thread of their own: both may shut down or restart."""

        def run() -> None:
            with self._lock:
                callbacks = list(self._callbacks)
                if self.failure is error:  # else a restart has come first
                    self._told = error
            _run(callbacks, error, log)
            then()

        _on_own_thread(run)

    def tell(self, error: BaseException, log: Any) -> None:
        """Runs the callbacks, on this thread, with ``error``, which nobody has been told of; unless things have moved on."""
        with self._lock:
            if self.failure is not error or self._told is error:
                return
            callbacks, self._told = list(self._callbacks), error
        _run(callbacks, error, log)


def _on_own_thread(run: Callable[[], None]) -> None:
    threading.Thread(target=run, name="exec-failure", daemon=True).start()


def _run(callbacks: Sequence[FailureCallback], error: BaseException, log: Any) -> None:
    for fn in callbacks:
        try:
            fn(error)
        except Exception:  # the others still have to hear of it
            log.exception("failure callback raised")


_lifecycles: weakref.WeakSet[Lifecycle] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child of the host has only copies of its executors. Closed, no call of them has to ask for the pid."""
    for lifecycle in list(_lifecycles):
        lifecycle.state = State.CLOSED


os.register_at_fork(after_in_child=_close_in_child)
