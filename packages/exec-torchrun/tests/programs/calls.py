"""Calls that succeed. Arguments: tensor, pipeline and data parallel sizes."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from common import RANK, config, record

import exec_core as ec
from exec_core.testing import workers
from exec_torchrun import ExecutorWithExternalLauncher, PerRank

tp, pp, dp = map(int, sys.argv[1:4])
replica = tp * pp
first = RANK // replica * replica


class CallWorker(workers.EchoWorker):
    """`EchoWorker` whose output rank alone has something to say, as the last stage of a pipeline has."""

    def execute_model(self, request: Any) -> Any:
        is_output = self.context.pp_rank == self.context.pp_size - 1 and self.context.tp_rank == 0
        return ("token", request, self.context.rank) if is_output else None


class Gathering(ExecutorWithExternalLauncher):
    """Calls return the values of all ranks where they do not say."""

    gather: ClassVar[bool] = True


def inside(worker: Any, directory: str) -> int:
    """How many ranks were in here at once."""
    return workers.overlap(worker, directory, work_s=0.02)


executor = ec.create_executor(config(CallWorker, tp=tp, pp=pp, dp=dp))
record(
    state=executor.state.value,
    world_size=executor.world_size,
    local=executor.collective_rpc("where", args=(7,)),
    gathered=executor.collective_rpc("where", args=(7,), gather=True),  # type: ignore[call-overload] # this backend's own
    by_callable=executor.collective_rpc(lambda worker, x: worker.context.rank * x, args=(10,)),
    reply_of_last=executor.collective_rpc("where", args=(8,), reply_ranks=[replica - 1]),
    run_by_last=executor.collective_rpc("where", args=(8,), ranks=[replica - 1]),
    aggregated=executor.collective_rpc("where", gather=True, aggregate=len),  # type: ignore[call-overload] # as above
    per_rank=executor.collective_rpc("where", args=(PerRank(RANK),)),
    future=executor.collective_rpc("where", args=(9,), non_block=True).result(20),
    step=executor.execute_model("request"),
    steps=[f.result(20)[1] for f in [executor.execute_model(n, non_block=True) for n in range(5)]],
    step_async=asyncio.run(executor.execute_model_async("async")),
    blocks=executor.determine_num_available_blocks(),
    sums={
        group: executor.collective_rpc(workers.add_up_ranks, args=(group,))[0] for group in ("tp", "pp", "dp", "world")
    },
    places=executor.collective_rpc(
        lambda worker: (worker.context.local_rank, worker.context.dp_rank, str(worker.context.device))
    ),
    default_group_before=dist.is_initialized(),
)
shared = Path(tempfile.gettempdir(), f"overlap-{executor.collective_rpc('where', reply_ranks=[0])[0][0]}-{sys.argv[4]}")
shared.mkdir(exist_ok=True)
record(
    overlap_at_once=max(executor.collective_rpc(inside, args=(str(shared),), gather=True)),  # type: ignore[call-overload] # as above
    overlap_one_by_one=max(
        executor.collective_rpc(inside, args=(str(shared),), gather=True, max_concurrent_workers=1)  # type: ignore[call-overload] # as above
    ),
)
ended = executor.start_worker_execution_loop()
looped = [executor.execute_model(n) for n in range(2)]
executor.stop_remote_worker_execution_loop()
record(looped=[value[1] for value in looped], loop_ended=ended.done())
executor.shutdown()
if RANK == first:
    shared.rmdir()

with Gathering(config(CallWorker, tp=tp, pp=pp, dp=dp)) as executor:
    record(
        gathered_by_class=executor.collective_rpc("where", args=(7,)),
        gathered_by_neither=executor.collective_rpc("where", args=(7,), gather=False),
    )

# A rank that leaves first waits for the others no longer than it may.
executor = ec.create_executor(config(CallWorker, tp=tp, pp=pp, dp=dp, rpc={"shutdown_timeout_s": 0.5}))
if RANK != first:
    time.sleep(3.0)  # the others are late on purpose
started = time.monotonic()
try:
    executor.shutdown()
finally:
    record(
        closing_s=time.monotonic() - started,
        state_after=executor.state.value,
        default_group_after=dist.is_initialized(),
    )
