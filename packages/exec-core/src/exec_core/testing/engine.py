"""The contract of an engine's calls: steps, pipelines, the execution loop, cache, sleep, profile, weights."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exec_core.config import CacheConfig
from exec_core.errors import ConfigError, ExecutorClosedError
from exec_core.executor import Executor
from exec_core.testing import workers
from exec_core.testing.base import ContractBase, Start
from exec_core.testing.sync import Gate

torch = pytest.importorskip("torch")


class EngineContract(ContractBase):
    """What an inference engine asks of an executor."""

    # Steps

    def test_step_runs_everywhere_and_returns_the_output_ranks_value(self, executor: Executor) -> None:
        """``execute_model`` runs on every rank and returns the value of the first TP rank of the last stage, itself."""
        self.steps(executor)
        tp, pp = self.parallel.tensor_parallel_size, self.parallel.pipeline_parallel_size

        assert ((pp - 1) * tp, "r") == executor.execute_model("r")
        assert (pp - 1) * tp == executor.output_rank
        assert [["r"]] * len(self.world()) == self.steps(executor)

    def test_step_as_a_future(self, executor: Executor) -> None:
        """``execute_model(non_block=True)`` returns a future of the one value."""
        assert (executor.output_rank, "r") == executor.execute_model("r", non_block=True).result(30)

    def test_step_awaited(self, executor: Executor) -> None:
        """``execute_model_async`` awaits the one value."""
        assert (executor.output_rank, "r") == asyncio.run(executor.execute_model_async("r"))

    def test_steps_keep_their_order(self, executor: Executor) -> None:
        """Many steps in flight: each rank runs them in the order of the calls, and each caller gets its own value."""

        async def main() -> Any:
            return await asyncio.gather(*(executor.execute_model_async(n) for n in range(20)))

        self.steps(executor)
        assert [(executor.output_rank, n) for n in range(20)] == asyncio.run(main())
        assert [list(range(20))] * len(self.world()) == self.steps(executor)

    def test_as_many_steps_in_flight_as_stages(self, start: Start, gate: Gate) -> None:
        """Without configuring anything, one step per stage and one more can be in flight."""
        executor = start(workers.AsyncOutputWorker, worker_kwargs={"gate": gate})
        futures = [
            executor.execute_model(n, non_block=True) for n in range(2 * (self.parallel.pipeline_parallel_size + 1))
        ]
        gate.open()

        assert [n for n, _ in (future.result(30) for future in futures)] == list(range(len(futures)))

    def test_error_of_a_step(self, executor: Executor) -> None:
        """What a rank raises in a step, ``execute_model`` raises, in all three forms."""
        with pytest.raises(ValueError, match="bad"):
            executor.execute_model(ValueError("bad"))
        with pytest.raises(ValueError, match="bad"):
            executor.execute_model(ValueError("bad"), non_block=True).result(30)
        with pytest.raises(ValueError, match="bad"):
            asyncio.run(executor.execute_model_async(ValueError("bad")))

    def test_output_rank_can_be_chosen(self, start: Start) -> None:
        """``ExecutorConfig.output_rank`` says whose value a step returns."""
        assert start(output_rank=0).execute_model("r") == (0, "r")

    def test_worker_without_execute_model_says_so(self, start: Start) -> None:
        """The default hook is an error that names class and method."""
        from exec_core.worker import Worker

        with pytest.raises(NotImplementedError, match="Worker does not implement execute_model"):
            start(Worker).execute_model("r")

    # Groups

    @pytest.mark.parametrize("group", ["tp", "pp", "dp", "world"])
    def test_collectives(self, executor: Executor, group: str) -> None:
        """An all_reduce in each group adds up over exactly that group's ranks."""
        tp = self.parallel.tensor_parallel_size
        keys: dict[str, Callable[[int], int]] = {
            "tp": lambda rank: rank // tp, "pp": lambda rank: rank % tp, "dp": lambda rank: rank, "world": lambda rank: 0,
        }  # fmt: skip
        of_group = keys[group]
        sums = [float(sum(o for o in self.world() if of_group(o) == of_group(rank))) for rank in self.world()]

        assert sums == executor.collective_rpc(workers.add_up_ranks, 30.0, args=(group,))

    def test_groups_know_their_ranks(self, executor: Executor) -> None:
        """Each group lists its global ranks and this worker's position among them."""

        def described(worker: Any) -> dict[str, Any]:
            groups = worker.context.groups
            return {name: (getattr(groups, name).ranks, getattr(groups, name).rank) for name in ("tp", "pp", "world")}

        tp = self.parallel.tensor_parallel_size
        for rank, groups in enumerate(executor.collective_rpc(described)):
            assert (tuple(r for r in self.world() if r // tp == rank // tp), rank % tp) == groups["tp"]
            assert (tuple(r for r in self.world() if r % tp == rank % tp), rank // tp) == groups["pp"]
            assert (tuple(self.world()), rank) == groups["world"]

    # Cache

    def test_number_of_blocks_is_the_minimum(self, executor: Executor) -> None:
        """``determine_num_available_blocks`` is the minimum over the ranks, device and host apart."""
        assert (100 - self.last(), 10) == executor.determine_num_available_blocks()

    def test_initialize_cache_reaches_every_rank(self, executor: Executor) -> None:
        """``initialize_cache`` gives every rank both numbers."""
        executor.initialize_cache(7, 3)
        entries = executor.collective_rpc("entries", args=("cache",))
        executor.collective_rpc(lambda worker: worker.journal.clear())

        assert [[("cache", 7, 3)]] * len(self.world()) == entries

    def test_default_worker_takes_blocks_from_the_config(self, start: Start) -> None:
        """A worker that does not profile has the blocks that the configuration says."""
        from exec_core.worker import Worker

        executor = start(Worker, cache=CacheConfig(num_gpu_blocks=5, num_cpu_blocks=2))

        assert executor.determine_num_available_blocks() == (5, 2)

    @pytest.mark.parametrize("given", [{"num_gpu_blocks": 5}, {"num_cpu_blocks": 0}])
    def test_blocks_of_the_config_override_any_worker(self, start: Start, given: dict[str, int]) -> None:
        """A number of blocks in the configuration is taken instead of what a worker profiles that does not look at it."""
        profiled = {"num_gpu_blocks": 100 - self.last(), "num_cpu_blocks": 10}
        executor = start(cache=CacheConfig(**given))

        assert executor.determine_num_available_blocks() == tuple({**profiled, **given}.values())

    def test_with_both_numbers_of_blocks_nobody_profiles(self, start: Start) -> None:
        """With both numbers in the configuration no worker is asked; a closed executor refuses all the same."""

        class Unable(workers.EchoWorker):
            def determine_num_available_blocks(self) -> tuple[int, int]:
                raise MemoryError("no memory to profile in")

        executor = start(Unable, cache=CacheConfig(num_gpu_blocks=5, num_cpu_blocks=2))
        assert executor.determine_num_available_blocks() == (5, 2)
        executor.shutdown()
        with pytest.raises(ExecutorClosedError):
            executor.determine_num_available_blocks()

    # Sleep, model, profile, weights

    def test_sleep_and_wake_up(self, executor: Executor) -> None:
        """``sleep`` and ``wake_up`` reach every rank once, and ``is_sleeping`` follows."""
        executor.collective_rpc(lambda worker: worker.journal.clear())
        assert not executor.is_sleeping
        executor.sleep(level=2)
        assert executor.is_sleeping
        executor.sleep(level=1)
        executor.wake_up()
        assert not executor.is_sleeping
        executor.wake_up()
        journals = executor.collective_rpc(lambda worker: list(worker.journal))
        executor.collective_rpc(lambda worker: worker.journal.clear())

        assert [[("sleep", 2), ("wake_up", None)]] * len(self.world()) == journals

    def test_sleep_refuses_other_levels(self, executor: Executor) -> None:
        """A level that is neither 1 nor 2 is an error, awake or asleep, and reaches no rank."""
        executor.collective_rpc(lambda worker: worker.journal.clear())
        for level in (0, 3):
            with pytest.raises(ConfigError, match=f"level must be 1 .* or 2 .*, got {level}"):
                executor.sleep(level)
            executor.sleep()
        executor.wake_up()
        levels = executor.collective_rpc("entries", args=("sleep",))
        executor.collective_rpc(lambda worker: worker.journal.clear())

        assert [[("sleep", 1)]] * len(self.world()) == levels

    def test_wake_up_by_tags(self, executor: Executor) -> None:
        """Waking some tags leaves the executor asleep until the others are awake too."""
        executor.sleep()
        executor.wake_up(["weights"])
        assert executor.is_sleeping
        executor.wake_up(["kv_cache"])
        assert not executor.is_sleeping
        tags = executor.collective_rpc("entries", args=("wake_up",))
        executor.collective_rpc(lambda worker: worker.journal.clear())

        assert [[("wake_up", ["weights"]), ("wake_up", ["kv_cache"])]] * len(self.world()) == tags

    def test_apply_model(self, executor: Executor) -> None:
        """``apply_model`` runs a function on the model of every rank."""
        assert [8.0 * rank for rank in self.world()] == executor.apply_model(fn=lambda model: model.weight.sum().item())

    def test_profile(self, executor: Executor) -> None:
        """Starting and stopping a profile gives one table per rank; stopping without one is an error."""
        executor.start_profile()
        executor.collective_rpc(lambda worker: __import__("torch").ones(8).sum().item())
        tables = executor.stop_profile()

        assert [True] * len(self.world()) == ["aten::sum" in table for table in tables]
        with pytest.raises(Exception, match="no profile is running"):
            executor.stop_profile()

    def test_save_sharded_state(self, executor: Executor, tmp_path: Path) -> None:
        """Every rank writes its own weights into the directory, in parts of at most ``max_size`` bytes."""
        executor.save_sharded_state(os.fspath(tmp_path / "whole"))
        executor.save_sharded_state(os.fspath(tmp_path / "parts"), pattern="w-{rank}-{part}.pt", max_size=32)

        for rank in self.world():
            (whole,) = (tmp_path / "whole").glob(f"*rank-{rank}-*")
            state = torch.load(whole)
            assert ({"weight", "bias"}, float(rank)) == (set(state), state["bias"][0].item())
            parts = [torch.load(tmp_path / "parts" / f"w-{rank}-{part}.pt") for part in range(2)]
            assert [list(part) for part in parts] == [["weight"], ["bias"]]
        assert 2 * len(self.world()) == len(os.listdir(tmp_path / "parts"))

    def test_check_health(self, executor: Executor) -> None:
        """A running executor is healthy, also while its workers work."""
        executor.check_health()

    def test_health_does_not_queue_behind_work(self, executor: Executor, gate: Gate) -> None:
        """``check_health`` and ``workers`` answer while every rank is inside a call, and say which."""
        assert ["idle"] * len(self.world()) == [worker.state for worker in executor.workers]
        future = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
        gate.entered(self.world())
        executor.check_health()
        busy = executor.workers
        gate.open()
        future.result(30)

        assert [(rank, "busy", "wait_at", False) for rank in self.world()] == [
            (worker.rank, worker.state, worker.method, worker.timed_out) for worker in busy
        ]
        assert all(worker.busy_s > 0 for worker in busy)
        pids = executor.collective_rpc(lambda worker: os.getpid())
        assert pids == [worker.pid for worker in executor.workers]
