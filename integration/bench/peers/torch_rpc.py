"""`torch.distributed.rpc`, with its TensorPipe agent on this machine."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed import rpc

from bench.peer import Peer
from bench.work import Work

_work = Work()  # of this process


def _run(method: str, args: tuple[Any, ...]) -> Any:
    """In a worker: one call."""
    return _work.run(method, args)


class TorchRpcPeer(Peer):
    """The driver calls workers by name; the workers are forked before any of them starts its agent."""

    distribution: ClassVar[str | None] = "torch"

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._directory = tempfile.TemporaryDirectory(prefix="bench-rpc-")
        where = f"file://{Path(self._directory.name) / 'store'}"
        fork = multiprocessing.get_context("fork")
        self._processes = [fork.Process(target=_serve, args=(rank, n, where), daemon=True) for rank in range(n)]
        for process in self._processes:
            process.start()
        _join("driver", n, n, where)
        self._names = [f"worker{rank}" for rank in range(n)]

    def _send(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        return [rpc.rpc_async(name, _run, args=(method, args)) for name in self._names]

    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """One remote call per worker."""
        sent = self._send(method, args)
        return [future.wait() for future in (sent[:1] if one_reply else sent)]

    def in_flight(self, count: int, window: int) -> None:
        """Futures."""
        under_way: deque[list[Any]] = deque()
        for _ in range(count):
            if len(under_way) == window:
                torch.futures.wait_all(under_way.popleft())
            under_way.append(self._send("noop", ()))
        torch.futures.wait_all(list(itertools.chain.from_iterable(under_way)))

    def stop(self) -> None:
        """Leaves together with the workers."""
        rpc.shutdown()
        for process in self._processes:
            process.join(5)
        self._directory.cleanup()


def _join(name: str, rank: int, n: int, where: str) -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=where, num_worker_threads=4)
    join: Callable[..., None] = rpc.init_rpc  # has no types
    join(name, rank=rank, world_size=n + 1, rpc_backend_options=options)


def _serve(rank: int, n: int, where: str) -> None:
    torch.set_num_threads(1)
    _join(f"worker{rank}", rank, n, where)
    rpc.shutdown()  # returns when everybody has called it
