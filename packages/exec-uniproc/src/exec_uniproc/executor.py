"""`UniProcExecutor`: one worker in the caller's process, for one device and for debugging."""

from __future__ import annotations

from typing import ClassVar

from exec_core import devices
from exec_core.config import ExecutorConfig
from exec_core.context import WorkerInit
from exec_core.errors import ConfigError
from exec_core.executor import Executor
from exec_core.inprocess import InProcessGroup


class UniProcExecutor(Executor):
    """Runs the only worker in the calling thread: no processes, no pickling, breakpoints work.

    ``worker_kwargs``, arguments and results pass by reference. Several may live in one process.
    """

    backend: ClassVar[str] = "uniproc"

    def _launch(self, deadline: float) -> InProcessGroup:  # noqa: ARG002 # nothing here takes time
        _check(self._config)
        return InProcessGroup(self._worker_init(), self._room, self._report_progress)

    def _worker_init(self) -> WorkerInit:
        placement = devices.place(
            self._config.device, self._config.parallel, local_size=1, count=devices.count_in_this_process
        )
        local_rank = devices.index_in_this_process(placement, 0) if placement.kind == "cuda" else 0
        return WorkerInit(
            config=self._config,
            rank=0,
            local_rank=local_rank,
            distributed_init_method=None,
            device_name={"cuda": f"cuda:{local_rank}", "cpu": "cpu", "none": None}[placement.kind],
            private_root=self._private_root,
            executor=self._name,
            backend=self.backend,
            generation=self.generation,
            in_driver=True,
        )


def _check(config: ExecutorConfig) -> None:
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(config.parallel, name) != 1:
            raise ConfigError(
                f"ParallelConfig.{name}", "must be 1 with backend 'uniproc'", getattr(config.parallel, name),
                remedy="use backend 'mp' for several ranks on one machine, 'torchrun' for replicas",
            )  # fmt: skip
