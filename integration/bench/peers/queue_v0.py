"""The design of vLLM's first multiprocessing executor, imitated: a queue for each worker, one for all results.

A thread of the driver reads the results and wakes the caller. Payloads travel as plain pickles, so that they arrive as
the receiver's own memory; torch's own queues would pass them by reference.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import threading
from collections import deque
from typing import Any

from bench.peer import Peer
from bench.work import Work


class _Result:
    """What a caller waits on."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: Any = None


class QueuePeer(Peer):
    """One task per worker and call; the workers are forked."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        import torch  # noqa: F401 # once, before the forks

        fork = multiprocessing.get_context("fork")
        self._tasks = [fork.Queue() for _ in range(n)]
        self._answers: Any = fork.Queue()
        self._processes = [
            fork.Process(target=_serve, args=(tasks, self._answers), daemon=True) for tasks in self._tasks
        ]
        for process in self._processes:
            process.start()
        self._ids = itertools.count()
        self._results: dict[int, _Result] = {}
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        while (answer := self._answers.get()) is not None:
            task, value = answer
            result = self._results.pop(task)
            result.value = pickle.loads(value)
            result.done.set()

    def _send(self, method: str, args: tuple[Any, ...]) -> list[_Result]:
        message = pickle.dumps((method, args), pickle.HIGHEST_PROTOCOL)
        sent = []
        for tasks in self._tasks:
            task, result = next(self._ids), _Result()
            self._results[task] = result
            tasks.put((task, message))
            sent.append(result)
        return sent

    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """Puts a task into each queue, then waits for the results."""
        sent = self._send(method, args)
        return [_value(result) for result in (sent[:1] if one_reply else sent)]

    def in_flight(self, count: int, window: int) -> None:
        """Puts ahead."""
        under_way: deque[list[_Result]] = deque()
        for _ in range(count):
            if len(under_way) == window:
                for result in under_way.popleft():
                    _value(result)
            under_way.append(self._send("noop", ()))
        for result in itertools.chain.from_iterable(under_way):
            _value(result)

    def stop(self) -> None:
        """Tells the workers and the thread to leave."""
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(5)
        self._answers.put(None)
        self._thread.join(5)


def _value(result: _Result) -> Any:
    result.done.wait()
    return result.value


def _serve(tasks: Any, answers: Any) -> None:
    work = Work()
    while (task := tasks.get()) is not None:
        number, message = task
        method, args = pickle.loads(message)
        answers.put((number, pickle.dumps(work.run(method, args), pickle.HIGHEST_PROTOCOL)))
