"""exec-mp through its public calls, with default settings."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from typing import Any, ClassVar

import exec_core
from bench.peer import Peer
from bench.work import Work


class BenchWorker(exec_core.Worker):
    """Runs the methods of `Work`."""

    def __init__(self, context: exec_core.WorkerContext) -> None:
        super().__init__(context)
        work = Work()
        self.noop, self.take, self.give = work.noop, work.take, work.give
        self.echo, self.checksum, self._step = work.echo, work.checksum, work.step
        self.built_at = time.monotonic()

    def built(self) -> float:
        """When it was, on the clock that all processes share."""
        return self.built_at

    def execute_model(self, request: tuple[float, object]) -> None:
        """A step."""
        self._step(*request)


def config(
    n: int,
    backend: str = "mp",
    rpc: exec_core.RpcConfig | None = None,
    device: exec_core.DeviceConfig | None = None,
) -> exec_core.ExecutorConfig:
    """Default settings, on CPU; only warnings are logged."""
    return exec_core.ExecutorConfig(
        rpc=rpc or exec_core.RpcConfig(),
        worker_cls=BenchWorker,
        backend=backend,
        parallel=exec_core.ParallelConfig(tensor_parallel_size=n),
        device=device or exec_core.DeviceConfig(device="cpu"),
        log=exec_core.LogConfig(level="warning"),
    )


class ExecMp(Peer):
    """An executor of this project; ``backend`` says which."""

    distribution: ClassVar[str | None] = "exec-mp"
    backend: ClassVar[str] = "mp"
    device: ClassVar[exec_core.DeviceConfig | None] = None

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._executor = exec_core.create_executor(config(n, self.backend, device=self.device))

    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """`collective_rpc`: every rank has acknowledged when it returns, whoever's value was wanted."""
        return self._executor.collective_rpc(method, args=args, reply_ranks=(0,) if one_reply else None)

    def step(self, busy_s: float, payload: object, one_reply: bool) -> None:
        """`execute_model`, which returns when every rank has acknowledged, as `call` does."""
        self._executor.execute_model((busy_s, payload))

    def in_flight(self, count: int, window: int) -> None:
        """Futures."""
        under_way: deque[Future[list[Any]]] = deque()
        for _ in range(count):
            if len(under_way) == window:
                under_way.popleft().result()
            under_way.append(self._executor.collective_rpc("noop", non_block=True))
        for future in under_way:
            future.result()

    def stop(self) -> None:
        """`shutdown`."""
        self._executor.shutdown()


class ExecMpBare(ExecMp):
    """Without process groups: the executor's own processes and nothing else. The threads of gloo never quite sleep."""

    device: ClassVar[exec_core.DeviceConfig | None] = exec_core.DeviceConfig(device="cpu", distributed_backend="none")
