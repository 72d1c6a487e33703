"""A program with a process group of its own, executors on top of it, and then other things that are wrong."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from common import RANK, config, outcome, record

import exec_core as ec
from exec_core import devices
from exec_core.testing import workers


def total() -> float:
    """A collective of the program's own."""
    value = torch.tensor([float(RANK + 1)])
    dist.all_reduce(value)
    return value.item()


def groups(worker: Any) -> tuple[bool, bool]:
    """Whether the executor's world is the program's group, and a smaller group another one."""
    own = worker.context.groups
    return own.world.device_group is dist.group.WORLD, own.pp.device_group is not dist.group.WORLD


dist.init_process_group("gloo")
mine = dist.group.WORLD
first, second = (ec.create_executor(config(workers.EchoWorker, tp=2)) for _ in range(2))
record(
    groups=first.collective_rpc(groups),
    sums=[e.collective_rpc(workers.add_up_ranks, args=("tp",))[0] for e in (first, second)],
    total=total(),
    may_not_leave=outcome(first.reinitialize_distributed, ec.ReconfigureDistributedRequest(1, 0, "127.0.0.1", 1)),
    after_may_not=outcome(first.collective_rpc, workers.add_up_ranks, args=("tp",)),
)
first.shutdown()
record(second_after_first=second.collective_rpc(workers.add_up_ranks, args=("tp",))[0])
second.shutdown()
record(still_there=dist.group.WORLD is mine, total_after=total())
dist.destroy_process_group()

# Without a group of the program's, executors share the one that the first of them makes.
first, second = (ec.create_executor(config(workers.EchoWorker, pp=2)) for _ in range(2))
first.shutdown()
record(shared=second.collective_rpc(workers.add_up_ranks, args=("pp",))[0])
second.shutdown()
record(gone=not dist.is_initialized())

# A group of another size than the environment says.
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined] # public
record(other_world=outcome(ec.create_executor, config(workers.EchoWorker, tp=2)))
dist.destroy_process_group()

# Too few devices: for all ranks, or for the second one only, which alone can know.
devices.count_in_this_process = lambda: 1
cuda = ec.DeviceConfig(device="cuda")
record(too_few=outcome(ec.create_executor, config(workers.EchoWorker, tp=2, device=cuda)))
del os.environ["LOCAL_WORLD_SIZE"]
record(
    second_too_few=outcome(ec.create_executor, config(workers.EchoWorker, tp=2, device=cuda)),
    other_world_size=outcome(ec.create_executor, config(workers.EchoWorker, tp=2, dp=2)),
    no_groups=outcome(
        lambda: ec.create_executor(
            config(workers.EchoWorker, tp=2, device=ec.DeviceConfig(device="none"))
        ).determine_num_available_blocks()
    ),
    nothing=not dist.is_initialized(),
)

# A variable that is wrong on one rank only, which is the first or another.
local_rank = os.environ["LOCAL_RANK"]
for wrong in range(2):
    os.environ["LOCAL_RANK"] = "7" if wrong == RANK else local_rank
    record(**{f"wrong_on_{wrong}": outcome(ec.create_executor, config(workers.EchoWorker, tp=2))})
os.environ["LOCAL_RANK"] = local_rank
record(
    after_wrong=outcome(lambda: ec.create_executor(config(workers.EchoWorker, tp=2)).shutdown()),
)
