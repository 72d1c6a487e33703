"""One replica whose world changes: alone, one of two, alone, and a world that nobody else comes to.

Arguments: backend, tensor-parallel size, number of this replica, the ports of the worlds it joins, and a file for what
happened.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import exec_core as ec

HOST = "127.0.0.1"


class WorldWorker(ec.Worker):
    """Has a model, and can tell where it is."""

    def load_model(self) -> None:
        """Takes a number that nobody else has."""
        self.model = torch.tensor([time.monotonic_ns()])

    def place(self) -> dict[str, Any]:
        """Where this rank is, and the sums of the ranks plus one in its world and its groups."""
        context = self.context
        assert context.groups is not None  # every world here has some
        sums = {}
        for name in ("tp", "dp", "world"):
            value = torch.tensor([context.rank + 1.0])
            dist.all_reduce(value, group=getattr(context.groups, name).cpu_group)
            sums[name] = value.item()
        return {
            "rank": context.rank, "world_size": context.world_size, "dp_rank": context.dp_rank, "dp_size": context.dp_size,
            "sums": sums, "model": int(self.model),
        }  # fmt: skip


def attempt(executor: ec.Executor, request: ec.ReconfigureDistributedRequest) -> dict[str, Any]:
    """What became of an attempt that must fail."""
    started = time.monotonic()
    try:
        executor.reinitialize_distributed(request)
    except ec.ExecutorError as error:
        return {
            "type": type(error).__name__,
            "text": str(error),
            "seconds": time.monotonic() - started,
            "state": executor.state.value,
        }
    raise AssertionError("the new world has two replicas, and only one has come")


def main(backend: str, size: int, replica: int, ports: list[int]) -> dict[str, Any]:
    """Goes through all worlds; what happened in each."""
    request = ec.ReconfigureDistributedRequest
    gather = {"gather": True} if backend == "torchrun" else {}  # there a call returns this rank's value alone
    config = ec.ExecutorConfig(
        worker_cls=WorldWorker,
        backend=backend,
        parallel=ec.ParallelConfig(tensor_parallel_size=size, distributed_timeout_s=8.0),
        device=ec.DeviceConfig(device="cpu", threads_per_worker=1),
        log=ec.LogConfig(level="critical"),
    )
    seen: dict[str, Any] = {}
    with ec.create_executor(config) as executor:

        def places() -> Any:
            return executor.collective_rpc("place", 30.0, **gather)  # type: ignore[call-overload] # torchrun's own option

        seen["alone"] = places()
        executor.reinitialize_distributed(request(2, replica, HOST, ports[0]))
        seen["two"] = places()
        executor.reinitialize_distributed(request(1, 0, HOST, ports[1 + replica]))
        seen["alone again"] = places()
        seen["refused"] = attempt(executor, request(2, replica))
        seen["after refused"] = places()
        if replica == 0:
            seen["nobody"] = attempt(executor, request(2, 0, HOST, ports[3]))
            if executor.state is ec.State.FAILED:
                executor.restart()
            seen["after nobody"] = places()
        executor.reinitialize_distributed(request(2, request.SHUTDOWN_CURRENT_RANK))
        seen["end"] = executor.state.value
    return seen


if __name__ == "__main__":
    backend, size, replica, *ports = sys.argv[1:-1]
    seen = main(backend, int(size), int(replica), list(map(int, ports)))
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[-1]).write_text(json.dumps(seen), encoding="utf-8")
