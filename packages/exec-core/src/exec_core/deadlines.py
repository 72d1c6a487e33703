"""What is to happen when the deadline of a call passes that nobody waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any


class Deadlines:
    """Calls ``expire(item)`` for items whose deadline passes, on one thread that runs only while there are any."""

    def __init__(self, expire: Callable[[Any], None]) -> None:
        self._expire = expire
        self._lock = (
            threading.Lock()
        )  # guards the three below; taken as such, since a condition is not taken in one step
        self._changed = threading.Condition(self._lock)
        self._items: dict[Any, float] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, item: Any, deadline: float) -> None:
        with self._lock:
            sooner = deadline < min(self._items.values(), default=float("inf"))
            self._items[item] = deadline
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._watch, name="exec-deadlines", daemon=True)
                thread.start()
                self._thread = thread  # two would do no harm
            elif sooner:
                self._changed.notify()

    def discard(self, item: Any) -> None:
        with self._lock:
            self._items.pop(item, None)

    def _watch(self) -> None:
        while True:
            with self._lock:
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
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
