"""What a worker is given: its place in the world, its device, its groups."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import attrs

from exec_core import distributed, private
from exec_core.config import ExecutorConfig
from exec_core.drowsy import doze, rouse
from exec_core.errors import ConfigError, WorldJoinError

ReportProgress = Callable[[int, int, str], None]


@attrs.frozen(kw_only=True)
class WorkerInit:
    """What ``init_worker`` needs for one rank (see `WorkerContext` for the meanings).

    ``private_root`` is the executor's `BaseExecutor._private_root`; its group sweeps it in the end.
    """

    config: ExecutorConfig
    rank: int
    local_rank: int
    distributed_init_method: str | None
    device_name: str | None
    private_root: str
    executor: str
    backend: str
    generation: int
    in_driver: bool = False
    existing_group: str = "refuse"
    log_format: str = "json"


@attrs.define(kw_only=True, eq=False)
class WorkerContext:
    """What a worker knows of its place.

    Attributes:
        config: the executor's.
        rank, local_rank: in the world, and on this machine.
        distributed_init_method: where the world meets; None: a world of one.
        device_name: ``cuda:N`` or ``cpu``; None when the worker handles devices itself, unless it sets it in ``init_device``:
            the thread that finishes async outputs selects that device.
        executor, backend, generation: which executor this belongs to, and its restarts so far.
        in_driver: the worker shares the host's process, whose settings are left alone.
        existing_group: see `exec_core.distributed.World`.
        log_format: ``json`` or ``console``, for the worker's process.
        groups: process groups, from ``init_device`` on; None before, and when the worker joins none.
        log: structlog logger bound to the rank.
    """

    config: ExecutorConfig
    rank: int
    local_rank: int
    distributed_init_method: str | None
    device_name: str | None
    private_root: str
    executor: str = "executor"
    backend: str = ""
    generation: int = 0
    in_driver: bool = False
    existing_group: str = "refuse"
    log_format: str = "json"
    groups: distributed.ProcessGroups | None = None
    log: Any = None
    _given_up: Callable[[], bool] | None = None
    _progress: ReportProgress = lambda done, total, what: None
    _membership: distributed.Membership | None = None
    _private_dir: str | None = None  # once it has been asked for: the rank may become another
    _replicas: int | None = None  # of the world joined, where that is not the one it was made for

    @property
    def tp_size(self) -> int:
        return self.config.parallel.tensor_parallel_size

    @property
    def pp_size(self) -> int:
        return self.config.parallel.pipeline_parallel_size

    @property
    def dp_size(self) -> int:
        return self._replicas or self.config.parallel.data_parallel_size

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size % self.pp_size

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tp_size * self.pp_size)

    @property
    def is_driver_worker(self) -> bool:
        """Whether this is the first rank of its tensor-parallel group."""
        return self.rank % self.tp_size == 0

    @property
    def device(self) -> Any:
        """The `torch.device` of this rank; None when the worker handles devices itself."""
        if self.device_name is None:
            return None
        import torch

        return torch.device(self.device_name)

    @property
    def private_dir(self) -> str:
        """A directory of this rank's own (mode 0700), made on first use and swept when the generation ends.

        Raises:
            OSError: it cannot be made.
        """
        if self._private_dir is None:
            self._private_dir = os.path.join(self.private_root, f"rank-{self.rank}")
        for path in (self.private_root, self._private_dir):
            private.make(path)
        return self._private_dir

    def report_progress(self, done: int, total: int, what: str) -> None:
        """Tells the driver how far a long step is: ``done`` of ``total`` units of ``what``."""
        self._progress(done, total, what)

    def init_device(self) -> None:
        """The default of `Worker.init_device`: selects the device, joins torch.distributed, builds the groups."""
        if self.device_name is None:
            return
        if self.device_name.startswith("cuda"):
            import torch

            torch.cuda.set_device(self.device)
        if self.config.device.distributed_backend != "none":
            self.join(self.rank, self.world_size, self.distributed_init_method)

    def join(self, rank: int, world_size: int, init_method: str | None) -> None:
        """Joins a world as ``rank`` of ``world_size``, leaving the present one first."""
        self.leave()
        self._membership = distributed.join(
            distributed.World(
                rank=rank,
                world_size=world_size,
                tensor_parallel_size=self.tp_size,
                pipeline_parallel_size=self.pp_size,
                init_method=init_method,
                backend=self.config.device.distributed_backend,
                device=self.device_name or "cpu",
                timeout_s=self.config.parallel.distributed_timeout_s,
                given_up=self._given_up,
                existing="use" if self.existing_group == "use" else "refuse",
            )
        )
        self.groups = self._membership.groups
        if not self.in_driver:
            doze()

    def rejoin(self, dp_rank: int, dp_size: int, init_method: str) -> None:
        """Leaves the present world and joins one of ``dp_size`` replicas, this one being number ``dp_rank``.

        Raises:
            ConfigError: when that cannot work; nothing has changed.
            WorldJoinError: the present world is left, and the new one could not be joined. A rank that was alone is alone
                again, any other belongs to no world.
        """
        replica = self.tp_size * self.pp_size
        rank, world_size = dp_rank * replica + self.rank % replica, dp_size * replica
        if world_size > 1 and init_method.endswith(":0"):
            raise ConfigError("new_data_parallel_master_port", f"must be given for a world of {world_size} ranks", 0)
        if dp_rank >= dp_size:
            raise ConfigError(
                "new_data_parallel_rank", f"must be below {dp_size}", dp_rank, "the present rank cannot be kept"
            )
        if self._membership is not None:
            self._membership.check_may_leave()
        was_alone = self.world_size == 1
        try:
            self.join(rank, world_size, init_method if world_size > 1 else None)
        except Exception as error:
            if was_alone:
                self.join(0, 1, None)
            raise WorldJoinError(rank, world_size, init_method, str(error).splitlines()[0], was_alone) from error
        self.rank, self._replicas = rank, dp_size

    def leave(self) -> None:
        """Leaves the world, if any."""
        membership, self._membership, self.groups = self._membership, None, None
        if membership is not None:
            if not self.in_driver:
                rouse()
            membership.leave()

    def abort(self) -> None:
        """Gets the worker out of collectives that will not end; see `exec_core.distributed.Membership.abort`."""
        membership = self._membership
        if membership is not None:
            membership.abort()

    def close(self) -> None:
        """Gives up everything the context made. In a process of its own that is at the end of it."""
        backend = self.config.device.distributed_backend or ("gloo" if self.device_name == "cpu" else "nccl")
        try:
            # Gloo closes its connections one by one, and waits for its thread at each; the process's end closes all.
            if self.in_driver or backend != "gloo":
                self.leave()
        finally:
            # Elsewhere the launcher sweeps, which also outlives a killed worker. Other ranks may still use the root.
            if self.in_driver and self._private_dir is not None:
                private.sweep(self._private_dir)
