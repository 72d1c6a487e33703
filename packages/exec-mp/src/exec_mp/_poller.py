"""The background thread's wait: descriptors, each with what to do when it has something to read.

handler() -> True     goes on being watched
handler() -> False    is done with: its descriptor is at its end
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import time
from collections.abc import Callable, Mapping

Handler = Callable[[], bool]


class Poller:
    """One thread turns; others wake it, or switch the one descriptor that is not always listened to.

    Args:
        handlers: by descriptor.
        switched: a descriptor that is listened to only while `listen` says so.

    Attributes:
        listens: what `listen` has said last; None where Ctrl-C has cut it short.
    """

    def __init__(self, handlers: Mapping[int, Handler], switched: int, on_switched: Handler) -> None:
        self._control = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._epoll = select.epoll()
        except BaseException:
            os.close(self._control)
            raise
        self._switched = switched
        self.listens: bool | None = False
        self._handlers = {**handlers, self._control: self._woken, switched: on_switched}
        for fd in self._handlers:
            self._epoll.register(fd, 0 if fd == switched else select.EPOLLIN)

    def listen(self, on: bool) -> None:
        """Whether to listen to the switched descriptor; takes effect at once, also in a turn that waits. One thread at a time."""
        if self.listens is not on and not self._epoll.closed:
            self.listens = None
            self._epoll.modify(self._switched, select.EPOLLIN if on else 0)
            self.listens = on

    def wake(self) -> None:
        """Ends the present wait of `turn`."""
        os.eventfd_write(self._control, 1)

    def turn(self, until: float) -> None:
        """Waits for something to read, until ``until`` (monotonic seconds) at most, and deals with it."""
        wait_s = None if until == math.inf else max(0.0, until - time.monotonic())
        for fd, _ in self._epoll.poll(wait_s):
            handler = self._handlers.get(fd)  # an earlier one may have led to its end
            if handler is not None and not handler():
                del self._handlers[fd]
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.unregister(fd)

    def _woken(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._control)
        return True

    def close(self) -> None:
        self._epoll.close()
        os.close(self._control)
