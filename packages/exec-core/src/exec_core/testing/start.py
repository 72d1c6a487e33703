"""The contract of starting: what a worker is given, in which order, and what happens when it does not come up."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from exec_core.config import RpcConfig
from exec_core.errors import ConfigError, WorkerError, WorkerStartupError
from exec_core.executor import Executor
from exec_core.lifecycle import State
from exec_core.testing import workers
from exec_core.testing.base import GROUPS, ContractBase, Start
from exec_core.testing.sync import Gate, eventually

WORKERS = "exec_core.testing.workers"


def described(worker: Any) -> dict[str, Any]:
    """The plain fields of a worker's context."""
    names = (
        "rank local_rank world_size tp_rank tp_size pp_rank pp_size dp_rank dp_size is_driver_worker executor backend "
        "generation in_driver"
    )
    return {name: getattr(worker.context, name) for name in names.split()}


class StartContract(ContractBase):
    """Workers are built where they should be, with what they need."""

    def test_start_sequence(self, start: Start) -> None:
        """Each worker is built, then initialises its device, then loads; no other method runs before."""
        assert [["init_device", "load_model"]] * len(self.world()) == start(device=GROUPS).collective_rpc(
            lambda worker: list(worker.journal)
        )

    def test_context(self, executor: Executor) -> None:
        """Each worker knows its rank in the world and in each group, its executor and its backend."""
        tp, pp = self.parallel.tensor_parallel_size, self.parallel.pipeline_parallel_size
        first, *others = executor.collective_rpc(described)
        for rank, context in enumerate([first, *others]):
            assert {
                "rank": rank, "local_rank": rank, "world_size": len(self.world()),
                "tp_rank": rank % tp, "tp_size": tp, "pp_rank": rank // tp, "pp_size": pp, "dp_rank": 0, "dp_size": 1,
                "is_driver_worker": rank % tp == 0, "executor": first["executor"], "backend": executor.backend,
                "generation": 0, "in_driver": rank in self.local_ranks,
            } == context  # fmt: skip

    def test_context_has_device_and_config(self, executor: Executor) -> None:
        """The context's device is a torch.device, and its config is the executor's."""
        devices = executor.collective_rpc(lambda worker: str(worker.context.device))
        configs = executor.collective_rpc(lambda worker: worker.context.config)

        assert ["cpu"] * len(self.world()) == devices
        assert [executor.config.parallel] * len(self.world()) == [config.parallel for config in configs]

    def test_executor_describes_itself(self, executor: Executor) -> None:
        """Class, config, world size, generation and state are there to be read; Ray is not used."""
        config = executor.config

        assert type(executor) is Executor.get_class(config)
        assert (len(self.world()), 0, State.READY) == (executor.world_size, executor.generation, executor.state)
        assert executor.uses_ray is False

    def test_worker_kwargs(self, start: Start) -> None:
        """``worker_kwargs`` reach the worker's constructor."""
        executor = start(worker_kwargs={"layers": 3})

        assert [{"layers": 3}] * len(self.world()) == executor.collective_rpc(lambda worker: worker.worker_kwargs)

    def test_unknown_worker_kwargs_are_refused_by_the_base_class(self, start: Start) -> None:
        """A keyword that no constructor takes is an error that names it."""
        with pytest.raises(WorkerStartupError, match=r"unknown worker_kwargs \['layers'\]"):
            start("exec_core:Worker", worker_kwargs={"layers": 3})

    @pytest.mark.parametrize("path", [f"{WORKERS}:EchoWorker", f"{WORKERS}.EchoWorker", f"{WORKERS}:Outer.Inner"])
    def test_class_by_path(self, start: Start, path: str) -> None:
        """A worker class may be given by its path, with a colon or a dot before its name."""
        assert [(rank, 1) for rank in self.world()] == start(path).collective_rpc("where", args=(1,))

    def test_factory(self, start: Start) -> None:
        """Any callable that takes the context may stand for the class."""
        executor = start(workers.make_worker, worker_kwargs={"layers": 3})

        assert [{"made_by": "make_worker", "layers": 3}] * len(self.world()) == executor.collective_rpc(
            lambda worker: worker.worker_kwargs
        )

    def test_class_of_the_caller(self, start: Start) -> None:
        """A class that only the caller has works, `super` included."""

        class Local(workers.EchoWorker):
            def where(self, x: Any = None) -> Any:
                return "local", *super().where(x)

        assert [("local", rank, 1) for rank in self.world()] == start(Local).collective_rpc("where", args=(1,))

    def test_plain_class(self, start: Start) -> None:
        """A class that does not inherit from `Worker` works: it has its own methods and the default hooks."""
        executor = start(workers.PlainWorker, worker_kwargs={"factor": 10})

        assert [70 + rank for rank in self.world()] == executor.collective_rpc("times", args=(7,))
        assert 50 + executor.output_rank == executor.execute_model(5)
        executor.check_health()
        executor.initialize_cache(1, 1)
        executor.sleep()

    def test_delegating_class_is_used_as_it_is(self, start: Start) -> None:
        """An object that answers to any name is asked for nothing that was not called."""
        executor = start(workers.DelegatingWorker)

        assert [(rank, "anything", (1,)) for rank in self.world()] == executor.collective_rpc("anything", args=(1,))
        assert (executor.output_rank, "execute_model", ("r",)) == executor.execute_model("r")

    # Failing to start

    @pytest.mark.parametrize("phase", ["__init__", "init_device", "load_model"])
    def test_worker_that_raises_while_starting(self, start: Start, phase: str) -> None:
        """An error in a start phase on one rank says rank, phase and the original error, and leaves nothing behind."""
        with pytest.raises(WorkerStartupError, match="ValueError: told to fail") as caught:
            start(workers.FailingWorker, worker_kwargs={"phase": phase, "rank": self.last()})

        error = caught.value
        assert (self.last(), {"__init__": "init_worker"}.get(phase, phase)) == (error.rank, error.phase)
        assert f"rank {self.last()} (pid {error.pid}) failed in {error.phase}" in str(error)
        assert isinstance(error.__cause__, ValueError)

    def test_worker_that_exits_while_starting(self, start: Start) -> None:
        """A SystemExit while loading is a start-up error too, and does not end the caller."""
        with pytest.raises(WorkerStartupError, match="SystemExit") as caught:
            start(
                workers.FailingWorker,
                worker_kwargs={"phase": "load_model", "rank": self.last(), "error": SystemExit(3)},
            )

        assert isinstance(caught.value.__cause__, WorkerError)

    @pytest.mark.parametrize("path", ["no_such_module:Worker", f"{WORKERS}:NoSuchWorker", f"{WORKERS}.NoSuchWorker"])
    def test_class_that_cannot_be_imported(self, start: Start, path: str) -> None:
        """A worker class that cannot be imported is a start-up error that names the path."""
        with pytest.raises(WorkerStartupError, match=f"worker_cls '{path}' cannot be imported") as caught:
            start(path)

        assert caught.value.phase == "init_worker"
        assert isinstance(caught.value.__cause__, ImportError)

    def test_path_of_something_else(self, start: Start) -> None:
        """A path to something that cannot be called says what it is."""
        with pytest.raises(WorkerStartupError, match="is a str, not a class or callable"):
            start(f"{WORKERS}:__name__")

    def test_start_has_a_deadline(self, start: Start, gate: Gate) -> None:
        """A rank that does not come up within ``startup_timeout_s`` is named; one in the caller's process is waited for."""
        kwargs = {"phase": "load_model", "gate": gate}
        if not self.remote():
            opener = threading.Timer(0.1, gate.open)
            opener.start()
            assert (
                State.READY
                is start(workers.HoldingWorker, worker_kwargs=kwargs, rpc=RpcConfig(startup_timeout_s=0.05)).state
            )
            opener.join()
            return
        if self.local_ranks:
            gate.open()  # rank 0 would hold the caller
            return
        start().shutdown()  # what is prepared once per process may take longer than that
        with pytest.raises(WorkerStartupError, match="startup_timeout_s") as caught:
            start(
                workers.HoldingWorker,
                worker_kwargs=kwargs,
                rpc=RpcConfig(startup_timeout_s=1.0, shutdown_timeout_s=0.4),
            )

        assert caught.value.phase == "load_model"

    def test_unsupported_world_is_refused(self, start: Start) -> None:
        """Replicas in one world are for another backend: refused before anything is started, with the way out."""
        with pytest.raises(ConfigError, match=r"ParallelConfig.data_parallel_size must be 1 .* got 2; use backend"):
            start(parallel=self.parallel_with(data_parallel_size=2))

    # Loading

    def test_staggered_loading(self, start: Start, tmp_path: Path) -> None:
        """With ``max_parallel_loading_workers=1`` ranks load one after the other."""
        executor = start(
            workers.LoadingWorker,
            worker_kwargs={"directory": os.fspath(tmp_path)},
            parallel=self.parallel_with(max_parallel_loading_workers=1),
        )

        assert [1] * len(self.world()) == executor.collective_rpc(lambda worker: worker.most_at_once)

    def test_parallel_loading(self, start: Start, gate: Gate) -> None:
        """Without a limit all ranks are inside ``load_model`` at once."""

        def open_when_all_are_in() -> None:
            gate.entered(self.world())
            gate.open()

        opener = threading.Thread(target=open_when_all_are_in)
        opener.start()
        start(workers.HoldingWorker, worker_kwargs={"phase": "load_model", "gate": gate})
        opener.join()

    def test_progress_reaches_the_driver(self, start: Start) -> None:
        """What workers report while loading arrives by rank, and its end always does."""
        seen: list[tuple[int, int, int, str]] = []
        start(workers.ProgressWorker, on_progress=lambda *report: seen.append(report))
        eventually(lambda: all((rank, 3, 3, "tensors") in seen for rank in self.world()))

        assert {3} == {total for _, _, total, _ in seen}
        for rank in self.world():
            done = [done for who, done, _, _ in seen if who == rank]
            assert sorted(done) == done

    def test_error_of_on_progress_harms_nobody(self, start: Start) -> None:
        """A progress callback that raises ends neither the start nor a later call."""

        def broken(*report: Any) -> None:
            raise ZeroDivisionError

        executor = start(workers.ProgressWorker, on_progress=broken)
        future = executor.collective_rpc(lambda worker: worker.context.report_progress(1, 1, "x"), non_block=True)

        assert [None] * len(self.world()) == future.result(30)
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc(
            "where", args=(1,), non_block=True
        ).result(30)
