"""The future of a call.

Who waits for it receives, as a blocking caller does: a hand-over from another thread costs more than the round trip, and
that thread is not awake when a step of the usual length ends. Otherwise the background thread finishes it.

On the main thread Ctrl-C may come between any two calls, and half-notified waiters would wait for ever. So there `result`
receives and works out the outcome, which it returns at once; the background thread then tells all others, and callbacks.
Where there is nobody to be told, as while the call is still being submitted, it sets the future itself: that is one step.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from concurrent.futures._base import FINISHED, RUNNING
from time import monotonic
from typing import TYPE_CHECKING, Any

from exec_core.calls import deadline_after

if TYPE_CHECKING:
    from exec_core.asynchronous import Room
    from exec_mp._calls import Entry
    from exec_mp._receiver import Receiver

Told = tuple[Any, BaseException | None]
"""What a call has led to: its value, or its error."""


def tell(entry: Entry) -> Told:
    """The outcome of a finished call with a future, worked out once: ``aggregate`` is the user's.

    Raises:
        KeyboardInterrupt: on the main thread; it is as if this had not been called.
    """
    if entry.told is None and entry.error is not None:
        entry.told = None, entry.error
    if entry.told is None:
        try:
            entry.told = entry.outcome(), None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise
            entry.told = None, error
    return entry.told


class CallFuture(Future[Any]):
    """Of ``entry``, whose answers ``receiver`` reads; ``room`` is told when it is set here."""

    def __init__(self, entry: Entry, receiver: Receiver, room: Room) -> None:
        super().__init__()
        self._state = RUNNING  # a reply may come before it has been sent to all
        self._call: tuple[Entry, Receiver] | None = entry, receiver  # until it is set: these know the future as well
        self._room = room
        # The condition itself is not taken in one step: Ctrl-C could leave it taken.
        self._lock = self._condition._lock  # type: ignore[attr-defined] # noqa: SLF001
        self._awaited = False  # somebody waits under that lock, or is about to

    def result(self, timeout: float | None = None) -> Any:
        """See `concurrent.futures.Future.result`."""
        until, told, error = deadline_after(timeout), None, None
        try:
            told = self._receive(until)
            if told is None:
                self._awaited = True
                return super().result(None if timeout is None else until - monotonic())
            value, error = told
            if error is None:
                return value
            raise error
        finally:  # its traceback has this frame
            del self, told, error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `concurrent.futures.Future.exception`."""
        until = deadline_after(timeout)
        told = self._receive(until)
        if told is None:
            self._awaited = True
            return super().exception(None if timeout is None else until - monotonic())
        return told[1]

    def done(self) -> bool:
        """See `concurrent.futures.Future.done`."""
        call = self._call
        return super().done() if call is None else call[0].told is not None

    def running(self) -> bool:
        """See `concurrent.futures.Future.running`."""
        return super().running() and not self.done()

    def _receive(self, until: float) -> Told | None:
        """Receives for as long as that helps. None where the future is set already, or has to be waited for."""
        call = self._call
        if call is None:
            return None
        entry, receiver = call
        if entry.told is None and monotonic() < until:
            if receiver.is_current_thread():
                self._turn(receiver, until)
            elif threading.current_thread() is threading.main_thread():
                self._claim(entry, receiver, until)
            else:
                while receiver.read_for(entry, until):
                    receiver.act()
                receiver.end_reading_for(entry)
        return entry.told

    def _claim(self, entry: Entry, receiver: Receiver, until: float, *, at_once: bool = False) -> None:
        """Receives, works out the outcome, and leaves it to the background thread to tell others, if there are any.

        For the main thread, and, ``at_once``, for whoever submits the call.
        """
        entry.claimed = True  # who answers it from now on does not deliver it
        try:
            if receiver.read_for(entry, until, at_once=at_once) and receiver.is_answered(entry):
                self._set_quietly(entry, receiver, tell(entry))
            _end_claim(entry, receiver)
        except BaseException:
            _end_claim(entry, receiver)
            receiver.stop_reading_for(entry)
            raise

    def _set_quietly(self, entry: Entry, receiver: Receiver, told: Told) -> None:
        """Sets it, unless somebody has to be told of that."""
        value, error = told
        with receiver.lock, self._lock:
            callbacks = self._done_callbacks  # type: ignore[attr-defined]
            if not (entry.delivered or self._awaited or self._waiters or callbacks):
                # No call from here on: Ctrl-C finds all of it done, or nothing.
                self._result, self._exception, self._call = value, error, None
                self._state, entry.delivered = FINISHED, True
        if self._room.line:
            self._room.made()

    def _turn(self, receiver: Receiver, until: float) -> None:
        """A callback, on the background thread, waits for another future: this thread must go on watching."""
        self.add_done_callback(lambda _: receiver.look_again())
        receiver.act()
        while not self.done() and monotonic() < until:
            receiver.turn(until)

    def receive_at_once(self) -> bool:
        """While nobody else knows it, and the call has just been sent. Whether it is set, since all have answered already."""
        call = self._call
        if call is not None and not call[1].is_current_thread():
            self._claim(*call, math.inf, at_once=True)
        return self._call is None

    def set_result(self, result: Any) -> None:
        """See `concurrent.futures.Future.set_result`."""
        super().set_result(result)
        self._call = None

    def set_exception(self, exception: BaseException | None) -> None:
        """See `concurrent.futures.Future.set_exception`."""
        super().set_exception(exception)
        self._call = None


def _end_claim(entry: Entry, receiver: Receiver) -> None:
    entry.claimed = False  # first: who answers it later sees that
    receiver.end_claim(entry)
