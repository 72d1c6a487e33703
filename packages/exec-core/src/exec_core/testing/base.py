"""What the parts of the contract share: how a backend is configured, and the executors under test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from exec_core.backends import create_executor
from exec_core.config import DeviceConfig, ExecutorConfig, LogConfig, ParallelConfig, RpcConfig
from exec_core.executor import Executor
from exec_core.lifecycle import State
from exec_core.testing.leaks import leak_check
from exec_core.testing.sync import Gate
from exec_core.testing.workers import EchoWorker, touch_groups

Start = Callable[..., Executor]

GROUPS = DeviceConfig(device="cpu", threads_per_worker=1)
NO_GROUPS = attrs.evolve(GROUPS, distributed_backend="none")
_LATE_THREADS = ("exec-inline", "exec-inline-output", "exec-deadlines")


class ContractBase:
    """Configuration and fixtures of `ExecutorContract`.

    Attributes:
        backend: as in `ExecutorConfig.backend`.
        parallel: the world to test.
        local_ranks: ranks that run in the caller's process. There arguments and results pass by reference and a running
            method cannot be interrupted; the contract asserts that instead.
        alone: a process can hold one such executor at a time, since torch has one default process group.
    """

    backend: ClassVar[str | type[Executor]] = "uniproc"
    parallel: ClassVar[ParallelConfig] = ParallelConfig()
    local_ranks: ClassVar[frozenset[int]] = frozenset()
    alone: ClassVar[bool] = False
    _shared: ClassVar[Executor | None] = None  # the class's executor, started again when a test has needed the place

    @classmethod
    def make_config(cls, worker_cls: Any = EchoWorker, **changes: Any) -> ExecutorConfig:
        """A configuration of this backend on CPU, with ``changes`` of `ExecutorConfig`'s fields."""
        fields: dict[str, Any] = {
            "backend": cls.backend,
            "parallel": cls.parallel,
            "device": GROUPS,
            "rpc": RpcConfig(timeout_s=60.0, startup_timeout_s=60.0),
            "log": LogConfig(level="error", format="json"),
            **changes,
        }
        return ExecutorConfig(worker_cls=worker_cls, **fields)

    @classmethod
    def warm_up(cls) -> None:
        """Starts what outlives executors by design, so that it does not count as a leak."""

    @classmethod
    def world(cls) -> list[int]:
        """All ranks."""
        return list(range(cls.parallel.world_size))

    @classmethod
    def last(cls) -> int:
        """The last rank: one in a process of its own where the backend has any."""
        return cls.parallel.world_size - 1

    @classmethod
    def remote(cls) -> list[int]:
        """Ranks in processes of their own."""
        return [rank for rank in cls.world() if rank not in cls.local_ranks]

    def steps(self, executor: Executor) -> list[list[Any]]:
        """What each rank was given to execute; forgotten after this."""
        entries = executor.collective_rpc("entries", args=("step",))
        executor.collective_rpc(lambda worker: worker.journal.clear())
        return [[request for _, request in of_rank] for of_rank in entries]

    @classmethod
    def parallel_with(cls, **changes: Any) -> ParallelConfig:
        """`parallel` with ``changes``."""
        return attrs.evolve(cls.parallel, **changes)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _class_leaves_nothing(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        tmp_path_factory.getbasetemp()  # pytest's own directory is made before, not inside
        import torch  # noqa: F401 # what its import leaves open is not ours

        cls.warm_up()
        with leak_check():
            yield
            cls._close_shared()

    @classmethod
    def _close_shared(cls) -> None:
        shared, cls._shared = cls._shared, None
        if shared is not None:
            shared.shutdown()

    @pytest.fixture
    def _shared_executor(self) -> Executor:
        cls = type(self)
        if cls._shared is not None and cls._shared.state is not State.READY:
            cls._close_shared()  # a test before has failed
        if cls._shared is None:
            cls._shared = create_executor(self.make_config(worker_kwargs={"shared": True}))
            cls._shared.collective_rpc(touch_groups)
        return cls._shared

    @pytest.fixture
    def executor(self, _shared_executor: Executor) -> Iterator[Executor]:
        """One executor of `EchoWorker` for the class: tests leave it as they found it."""
        # It starts threads when they are first needed, and keeps them.
        with leak_check(allowed=lambda kind, item: kind == "threads" and item in _LATE_THREADS, orphans=False):
            yield _shared_executor

    @pytest.fixture
    def start(self) -> Iterator[Start]:
        """``start(worker_cls, on_progress=None, **changes)``: a ready executor for this test alone, closed after it.

        Without process groups unless the test asks for them by ``device=GROUPS``: joining them takes longest.
        """
        if self.alone:
            self._close_shared()
        with leak_check(orphans=False), contextlib.ExitStack() as stack:

            def started(worker_cls: Any = EchoWorker, on_progress: Any = None, **changes: Any) -> Executor:
                config = self.make_config(worker_cls, **{"device": NO_GROUPS, **changes})
                return stack.enter_context(create_executor(config, on_progress=on_progress))

            yield started

    @pytest.fixture
    def gate(self, tmp_path: Path) -> Iterator[Gate]:
        """A closed gate, opened after the test whatever happens."""
        directory = tmp_path / "gate"
        directory.mkdir()
        gate = Gate(os.fspath(directory))
        yield gate
        gate.open()
