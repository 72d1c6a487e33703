"""Calls awaited on an event loop: submitted as futures, with room awaited where a blocking call would wait for it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from exec_core.calls import Call
from exec_core.errors import ExecutorBusyError, RpcTimeoutError

if TYPE_CHECKING:  # loading asyncio takes long
    from asyncio import AbstractEventLoop
    from asyncio import Future as LoopFuture

Submit = Callable[[Call, bool], Future[Any]]
"""``submit(call, wait)``, see `exec_core.group.WorkerGroup.submit`."""

_LOOK_AGAIN_S = 0.005  # a reader that skips ahead in a full ring is not announced, unlike a call that ends


class Room:
    """The line of tasks that wait for room: they are served in the order they came, which is then the order of their calls.

    Tasks come and go, and backends look, on any thread: each a single atomic operation of the deque.

    Attributes:
        line: who waits. While it is not empty, who comes is not served before them, and the end of a call is `made` known.
    """

    def __init__(self) -> None:
        self.line: deque[_Place] = deque()

    def made(self) -> None:
        """For backends: a call has ended. Does nothing while nobody waits."""
        if self.line:
            try:
                first = self.line[0]
            except IndexError:  # it has left meanwhile, and has said so itself
                return
            first.wake()

    def enter(self) -> _Place:
        """A place at the end of the line, for the running task."""
        place = _Place()
        self.line.append(place)
        return place

    def leave(self, place: _Place) -> None:
        """Gives it up, served or not."""
        self.line.remove(place)
        self.made()

    def is_first(self, place: _Place) -> bool:
        """Whether it is this one's turn."""
        return self.line[0] is place


class _Place:
    """One task's place in the line."""

    def __init__(self) -> None:
        import asyncio  # with the first task that waits: a program that never awaits need not load it

        self._loop, self._woken = asyncio.get_running_loop(), asyncio.Event()

    def wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._woken.set)

    async def wait(self, limit_s: float) -> None:
        """Returns when it may be worth another look, or after ``limit_s``."""
        import asyncio

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), limit_s)
        self._woken.clear()


async def awaited(submit: Submit, call: Call, room: Room) -> Any:
    """The value of ``call``, see `submitted`."""
    submitting = submitted(submit, call, room)
    del call  # which knows its error, and the error where it came through
    return await awaited_future(await submitting)


async def submitted(submit: Submit, call: Call, room: Room) -> Future[Any]:
    """The future of ``call``, submitted by ``submit(call, wait=False)`` as soon as there is room.

    Raises:
        RpcTimeoutError: when there was none before the call's deadline.
    """
    if not room.line:
        with contextlib.suppress(ExecutorBusyError):
            return submit(call, False)
    place, why = room.enter(), "earlier calls wait for room"
    try:
        while True:
            if room.is_first(place):
                try:
                    return submit(call, False)
                except ExecutorBusyError as busy:
                    why = str(busy)
            remaining = call.deadline - time.monotonic()
            if remaining <= 0:
                raise RpcTimeoutError(call.name, call.timeout_s or 0.0, (), call.ranks, why=why)
            await place.wait(min(remaining, _LOOK_AGAIN_S))
    finally:
        room.leave(place)


async def awaited_future(future: Future[Any]) -> Any:
    """The value of ``future``.

    `asyncio.wrap_future` makes a cycle: value and error would wait for the garbage collector.
    """
    import asyncio

    try:
        if future.done():  # answered while it was being submitted
            await asyncio.sleep(0)  # others are to have a turn
        else:
            loop = asyncio.get_running_loop()
            done = loop.create_future()
            future.add_done_callback(functools.partial(_wake, loop, done))
            try:
                await done
            except asyncio.CancelledError:
                future.cancel()
                raise
        return future.result()
    finally:
        del future


def _wake(loop: AbstractEventLoop, done: LoopFuture[None], _: Future[Any]) -> None:
    """On any thread: has ``loop`` set ``done``."""
    with contextlib.suppress(RuntimeError):  # it is closed: nobody waits
        loop.call_soon_threadsafe(_set, done)


def _set(done: LoopFuture[None]) -> None:
    if not done.done():  # else it was cancelled
        done.set_result(None)
