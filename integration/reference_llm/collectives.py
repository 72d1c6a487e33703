"""The communication of one rank: within its tensor-parallel group, and with the stages before and after it.

Everything is a no-op where there is one rank, so the model is written once.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

from exec_core import ConfigError, ProcessGroups, WorkerContext


class Collectives:
    """What the model of one rank needs of `torch.distributed`.

    Args:
        context: of the worker; its groups may be absent when there is one rank. None: a model that is no worker's, whole.
    """

    def __init__(self, context: WorkerContext | None) -> None:
        self.tp_rank, self.tp_size = (0, 1) if context is None else (context.tp_rank, context.tp_size)
        self.pp_rank, self.pp_size = (0, 1) if context is None else (context.pp_rank, context.pp_size)
        self._groups = None if context is None else context.groups
        # Sends under way, oldest first. Each keeps its tensor alive until it has left.
        self._sends: deque[tuple[dist.Work, torch.Tensor]] = deque()

    @property
    def _joined(self) -> ProcessGroups:
        if self._groups is None:
            remedy = "leave it None, or use one rank"
            raise ConfigError("DeviceConfig.distributed_backend", "must join the ranks to each other", "none", remedy)
        return self._groups

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank chooses tokens."""
        return self.pp_rank == self.pp_size - 1

    def sum_over_shards(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of every shard's ``partial``, in place where there are several."""
        if self.tp_size > 1:
            dist.all_reduce(partial, group=self._joined.tp.device_group)
        return partial

    def stack_shards(self, mine: torch.Tensor) -> torch.Tensor:
        """Every shard's ``mine`` in shard order, along a new first dimension."""
        if self.tp_size == 1:
            return mine[None]
        stacked = mine.new_empty((self.tp_size, *mine.shape))
        dist.all_gather(list(stacked.unbind()), mine.contiguous(), group=self._joined.tp.device_group)
        return stacked

    def send_to_next_stage(self, hidden: torch.Tensor) -> None:
        """Starts sending ``hidden`` and returns: this stage goes on with its next step meanwhile."""
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        pipeline = self._joined.pp
        hidden = hidden.contiguous()
        work = dist.isend(hidden, dst=pipeline.ranks[self.pp_rank + 1], group=pipeline.device_group)
        if work is None:
            raise RuntimeError("this rank is not in its pipeline group")
        self._sends.append((work, hidden))

    def receive_from_previous_stage(self, hidden: torch.Tensor) -> torch.Tensor:
        """Fills ``hidden`` with what the stage before sent."""
        pipeline = self._joined.pp
        dist.recv(hidden, src=pipeline.ranks[self.pp_rank - 1], group=pipeline.device_group)
        return hidden
