"""Ranks that share one device, so that one is enough for what several ranks do over NCCL."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from exec_core.testing import faults
from exec_core.testing.workers import EchoWorker


class SharedDeviceWorker(EchoWorker):
    """A rank on the first device, whatever its number."""

    def init_device(self) -> None:
        self.context.device_name = "cuda:0"
        super().init_device()

    def sums(self) -> dict[str, list[float]]:
        """The sum of the ranks in each group that has several, of a tensor on the device and of one on the host."""
        groups = self.context.groups
        assert groups is not None  # `init_device` has made some
        return {
            name: [
                self._sum(group.device_group, self.context.device_name),
                self._sum(group.cpu_group, "cpu"),
            ]
            for name, group in (("tp", groups.tp), ("pp", groups.pp), ("dp", groups.dp), ("world", groups.world))
            if group.size > 1
        }

    def _sum(self, group: Any, device: Any) -> float:
        tensor = torch.full((1000,), float(self.context.rank), device=device)
        dist.all_reduce(tensor, group=group)
        return float(tensor[-1])

    def wait_for_others(self, absent: int) -> float:
        """A collective that rank ``absent`` does not join, waited for as a model does: by reading its result."""
        if self.context.rank == absent:
            time.sleep(faults.FOREVER_S)
        assert self.context.groups is not None
        return self._sum(self.context.groups.world.device_group, self.context.device_name)
