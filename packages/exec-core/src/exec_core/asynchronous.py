"""Calls awaited on an event loop: submitted as futures, with room awaited where a blocking call would wait for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from exec_core.calls import Call
from exec_core.errors import ExecutorBusyError, RpcTimeoutError

_LOOK_AGAIN_S = 0.005  # a reader that skips ahead in a full ring is not announced, unlike a call that ends


class Room:
    """Tasks that wait for room, woken one by one in the order they came.

    Event loops append, backends pop on any thread: each a single atomic operation of the deque.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def made(self) -> None:
        """For backends: a call has ended."""
        if self._waiting:
            try:
                wake = self._waiting.popleft()
            except IndexError:  # another thread took it
                return
            wake()

    async def wait(self, limit_s: float) -> None:
        """Returns when room may have been made, or after ``limit_s``."""
        import asyncio  # with the first task that waits: a program that never awaits need not load it

        loop, made = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(made.set)

        self._waiting.append(wake)
        try:
            await asyncio.wait_for(made.wait(), limit_s)
        except TimeoutError:
            pass
        finally:
            if wake in self._waiting:
                self._waiting.remove(wake)


async def awaited(submit: Callable[[Call, bool], Future[Any]], call: Call, room: Room) -> Any:
    """The value of ``call``, submitted by ``submit(call, wait=False)`` as soon as there is room.

    Raises:
        RpcTimeoutError: when there was none before the call's deadline.
    """
    while True:
        try:
            future = submit(call, False)
        except ExecutorBusyError as busy:
            remaining = call.deadline - time.monotonic()
            if remaining <= 0:
                raise RpcTimeoutError(call.name, call.timeout_s or 0.0, (), call.ranks, why=str(busy)) from busy
            await room.wait(min(remaining, _LOOK_AGAIN_S))
        else:
            return await awaited_future(future)


async def awaited_future(future: Future[Any]) -> Any:
    """The value of ``future``."""
    import asyncio

    return await asyncio.wrap_future(future)
