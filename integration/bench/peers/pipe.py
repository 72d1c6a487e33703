"""`multiprocessing.Pipe`: a pair of connected sockets for each worker, plain pickles on it."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench.peer import Peer
from bench.work import Work


class PipePeer(Peer):
    """Pickles a call once and sends it to each worker; the workers are forked."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        import torch  # noqa: F401 # once, before the forks

        fork = multiprocessing.get_context("fork")
        pairs = [fork.Pipe() for _ in range(n)]
        self._connections: Sequence[Any] = [ours for ours, _ in pairs]
        self._processes = []
        for rank, (_, theirs) in enumerate(pairs):
            self._processes.append(fork.Process(target=_serve, args=(rank, theirs, self._connections), daemon=True))
            self._processes[-1].start()
        for _, theirs in pairs:
            theirs.close()

    def _send(self, method: str, args: tuple[Any, ...], *, one_reply: bool = False) -> None:
        message = pickle.dumps((method, args, one_reply), pickle.HIGHEST_PROTOCOL)
        for connection in self._connections:
            connection.send_bytes(message)

    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """Sends to all, then reads the answers in rank order."""
        self._send(method, args, one_reply=one_reply)
        answering = self._connections[:1] if one_reply else self._connections
        return [pickle.loads(connection.recv_bytes()) for connection in answering]

    def in_flight(self, count: int, window: int) -> None:
        """Sends ahead."""
        for index in range(count + window):
            if index >= window:
                for connection in self._connections:
                    pickle.loads(connection.recv_bytes())
            if index < count:
                self._send("noop", ())

    def stop(self) -> None:
        """Closes the pipes: the workers read their end."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(5)


def _serve(rank: int, connection: Connection, others: Sequence[Connection]) -> None:
    for other in others:  # inherited: open here, they would never end
        other.close()
    work = Work()
    with contextlib.suppress(EOFError):
        while True:
            method, args, one_reply = pickle.loads(connection.recv_bytes())
            value = work.run(method, args)
            if rank == 0 or not one_reply:
                connection.send_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
