"""`MultiprocessingDistributedExecutor`: one process per rank on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from exec_core import affinity, devices, logs
from exec_core.context import WorkerInit
from exec_core.devices import Placement
from exec_core.errors import ConfigError, ExecutorError, WorkerStartupError
from exec_core.executor import Executor
from exec_core.group import WorkerGroup
from exec_core.inprocess import InProcessGroup
from exec_mp._calls import Entry
from exec_mp._channel import SPIN_S
from exec_mp._group import ProcessGroup
from exec_mp._launcher import LIMITS, Session, open_session
from exec_mp._layout import Geometry
from exec_mp._output import WorkerOutput
from exec_mp._parts import Hooks, Parts
from exec_mp._program import boot_record, run_program
from exec_mp._worker_main import RENDEZVOUS_FD

_ARENA_BYTES = 1 << 36  # address space only; smaller where limits refuse
_READ_AT_IMPORT = ("OMP_", "KMP_", "GOMP_", "LD_PRELOAD")  # variables that a forked worker would be too late for


class MultiprocessingDistributedExecutor(Executor):
    """Runs one process per rank, forked from a server that has torch imported, over a shared-memory channel.

    With ``driver_worker="inline"`` rank 0 runs in the caller's process; then a world of one has no other process at
    all.
    """

    backend: ClassVar[str] = "mp"
    _call_type = Entry
    _session: Session | None = None  # while it is being launched

    def _launch(self, deadline: float) -> WorkerGroup[Any]:
        _check(self._config.parallel.data_parallel_size)
        inline = self._config.parallel.driver_worker == "inline"
        if inline and self.world_size == 1:
            placement = devices.place(
                self._config.device, self._config.parallel, 1, count=devices.count_in_this_process
            )
            return InProcessGroup(self._init(0, placement, None, inline), self._room, self._report_progress)
        if inline and self._config.device.device != "none" and self._config.device.distributed_backend != "none":
            _refuse_process_group()
        rpc = self._config.rpc
        preload = rpc.preload if rpc.start_method == "forkserver" else ()
        try:
            session = self._session = open_session(preload, self._private_root, self._log)
            try:
                session.ready(deadline)
                return self._fork_group(session, inline, deadline)
            except BaseException:
                session.close()
                raise
        except OSError as error:
            if isinstance(error, ExecutorError):
                raise
            raise WorkerStartupError(None, "launch", f"the system refuses: {error}", remedy=LIMITS) from error
        except RuntimeError as error:  # what a thread that cannot be started raises
            raise WorkerStartupError(None, "launch", str(error), remedy=LIMITS) from error
        finally:
            self._session = None

    def _interrupt_launch(self) -> None:
        session = self._session
        if session is not None:
            session.abort()

    def _fork_group(self, session: Session, inline: bool, deadline: float) -> ProcessGroup:
        placement = devices.place(
            self._config.device, self._config.parallel, self.world_size, count=lambda: _count(session, deadline)
        )
        ranks = self._all_ranks[1:] if inline else self._all_ranks
        parts = Parts(session, self._geometry(1 + len(ranks)), ranks, self._output, self._private_root)
        try:
            inits = [
                self._init(rank, placement, RENDEZVOUS_FD if rank in ranks else parts.rendezvous, inline and rank == 0)
                for rank in self._all_ranks
            ]
            cores = self._cores(session, placement, deadline)
            for rank in ranks:
                self._fork(parts, placement, rank, cores[rank], deadline)
            hooks = Hooks(failed=self._fail, progress=self._report_progress, room=self._room, log=self._log)
            return ProcessGroup(inits, parts, hooks)
        except BaseException:
            parts.close()
            raise

    def _output(self, rank: int) -> WorkerOutput:
        directory = self._config.log.directory or ""
        path = os.path.join(directory, f"{self._name}-{self.generation}-rank-{rank}.log")
        return WorkerOutput(self._config.log, path, rank, self._log)

    def _cores(self, session: Session, placement: Placement, deadline: float) -> Sequence[frozenset[int] | None]:
        """The cores of each rank; None for those of the driver."""
        if placement.kind == "none" or self._config.device.cpu_affinity != "auto":
            return [None] * self.world_size
        listing = run_program(session, affinity.LIST_PROGRAM, {}, deadline) if placement.kind == "cuda" else ""
        return affinity.cores_of_ranks(placement, self.world_size, listing)

    def _fork(
        self, parts: Parts, placement: Placement, rank: int, cores: frozenset[int] | None, deadline: float
    ) -> None:
        device, size = self._config.device, self.world_size
        env = {**placement.env(), **self._config.env_of_rank(rank)}
        handled = placement.kind != "none"
        threads = devices.threads_per_worker(device, size, {**os.environ, **env}) if handled else None
        if threads is not None and cores is not None and device.threads_per_worker is None:
            threads = min(threads, len(cores))
        arguments = parts.channel.geometry, rank, threads, self._config.rpc.max_message_bytes
        boot = boot_record("exec_mp._worker_main:main", arguments, env, cores)
        execs = self._config.rpc.start_method == "spawn" or any(name.startswith(_READ_AT_IMPORT) for name in env)
        fds = [*parts.output[rank].descriptors, parts.rendezvous, parts.channel.fd, parts.channel.bells[rank]]
        fds += [parts.channel.bell, parts.stacks.bells[rank], parts.stacks.memory]
        parts.started(rank, *parts.session.fork(rank, boot, fds, execs=execs, deadline=deadline))

    def _geometry(self, processes: int) -> Geometry:
        """For so many processes, with the driver's."""
        rpc = self._config.rpc
        return Geometry(
            world_size=self.world_size,
            slots=2 * self._config.max_in_flight,  # twice: ranks that run fewer calls may lag behind the others
            inline_bytes=rpc.inline_bytes,
            arena_bytes=_ARENA_BYTES,
            spin_s=SPIN_S if rpc.spin_s == "auto" else rpc.spin_s,
            room=min(1.0, len(os.sched_getaffinity(0)) / processes),
        )

    def _init(self, rank: int, placement: Placement, rendezvous: int | None, in_driver: bool) -> WorkerInit:
        relay = "relay" if self._config.log.worker_output == "log" else ""
        index = devices.index_in_this_process(placement, rank) if in_driver and placement.kind == "cuda" else rank
        return WorkerInit(
            config=self._config,
            rank=rank,
            local_rank=rank,
            distributed_init_method=None if rendezvous is None else f"file:///proc/self/fd/{rendezvous}",
            device_name={"cuda": f"cuda:{index}", "cpu": "cpu", "none": None}[placement.kind],
            private_root=self._private_root,
            executor=self._name,
            backend=self.backend,
            generation=self.generation,
            in_driver=in_driver,
            log_format=relay or logs.resolve_format(self._config.log),
        )


def _check(data_parallel_size: int) -> None:
    if data_parallel_size != 1:
        raise ConfigError(
            "ParallelConfig.data_parallel_size", "must be 1 with backend 'mp'", data_parallel_size,
            remedy="use backend 'torchrun', or one executor per replica and reinitialize_distributed()",
        )  # fmt: skip


def _refuse_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        raise ConfigError(
            "ParallelConfig.driver_worker", "must be 'process' in a process with a default process group", "inline",
            remedy="rank 0 would need one of its own; or destroy the group first",
        )  # fmt: skip


def _count(session: Session, deadline: float) -> int:
    """CUDA devices, counted in a fork that has torch already: no context in the driver or the server."""
    if not devices.has_cuda_driver():
        return 0
    printed = run_program(session, devices.COUNT_PROGRAM, {}, deadline)
    return int(printed.split()[-1])
