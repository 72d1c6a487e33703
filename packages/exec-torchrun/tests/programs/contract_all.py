"""The executor contract in a world of several ranks; run by pytest in each process that torchrun started, in lock-step."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from exec_core import ParallelConfig, create_executor
from exec_core.errors import ConfigError
from exec_core.testing import ExecutorContract, Gate, eventually, workers
from exec_core.testing.base import NO_GROUPS
from exec_torchrun import ExecutorWithExternalLauncher

RANKS = int(os.environ["WORLD_SIZE"])
RANK = int(os.environ["RANK"])

NOT_HERE = {  # what cannot hold where every rank is its own driver, and why
    "test_context": "each rank's executor has a name of its own",
    "test_start_has_a_deadline": "a rank waits for itself, and for the others until then: which comes first is chance",
    "test_eight_threads_get_their_own_answers": "calls of several threads have no order that all ranks share",
    "test_one_order_on_all_ranks": "likewise",
    "test_call_to_a_looping_rank_is_refused": "no rank is kept in the loop: every program makes the steps",
    "test_health_does_not_queue_behind_work": "a rank knows the state of its own worker only",
    "test_health_names_the_rank_that_is_still_inside": "likewise",
    "test_stuck_rank_is_unhealthy": "likewise",
    "test_error_says_where": "likewise; the note itself is in test_guard.py",
    "test_error_brings_the_remote_traceback": "its own traceback on the rank that raised, a remote one elsewhere",
    "test_timeout_of_a_blocking_call": "others time out, and the rank itself cannot be interrupted",
    "test_async_output_lets_the_next_call_start": "an output is finished in its call: all ranks hear of its error with the end",
    "test_private_directory": "a rank leaves together with the others, but does not see their ends",
    "test_workers_are_told_of_the_end": "likewise",
    "test_error_of_a_class_that_only_the_caller_has": "a class made inside a function is each rank's own",
    "test_class_of_the_caller_travels_by_value": "likewise",
    "test_unpicklable_argument_is_named": "arguments do not travel, and the values of other ranks do",
    "test_results_by_reference_in_the_callers_process": "likewise",
    "test_worker_has_the_process_it_should": "the others are in processes of their own",
}


class Gathering(ExecutorWithExternalLauncher):
    """Calls return the values of all ranks, as on the other backends."""

    gather: ClassVar[bool] = True


@attrs.frozen
class CommonGate(Gate):
    """A gate that is open when every rank's program has opened it: none is ahead of the others."""

    def wait(self, rank: int) -> None:
        self._touch(f"entered-{rank}")
        eventually(lambda: all(os.path.exists(os.path.join(self.directory, f"open-{r}")) for r in range(RANKS)))

    def open(self) -> None:
        self._touch(f"open-{RANK}")


class TestAllRanks(ExecutorContract):
    """Every rank's worker in its own program's process."""

    backend = Gathering
    parallel = ParallelConfig(tensor_parallel_size=RANKS)
    local_ranks = frozenset(range(RANKS))  # arguments pass by reference, and a method cannot be interrupted

    @classmethod
    def warm_up(cls) -> None:
        """The connection to the launcher's store stays for the next executor."""
        create_executor(cls.make_config(device=NO_GROUPS)).shutdown()

    @pytest.fixture
    def tmp_path(self, request: pytest.FixtureRequest) -> Path:
        """One directory for all ranks: its path is an argument of calls."""
        path = Path(os.environ["RECORDS"], "common", re.sub(r"\W+", "-", request.node.name))
        path.mkdir(parents=True, exist_ok=True)
        return path

    @pytest.fixture
    def gate(self, tmp_path: Path) -> Any:
        """A closed gate for all ranks."""
        directory = tmp_path / "gate"
        directory.mkdir(exist_ok=True)
        gate = CommonGate(os.fspath(directory))
        yield gate
        gate.open()

    def test_unsupported_world_is_refused(self, start: Any) -> None:
        """Replicas in one world are what this backend is for; their number has to be that of the launched ranks."""
        with pytest.raises(
            ConfigError, match=rf"WORLD_SIZE must be 2 \(data parallel\) x {RANKS} .* got {RANKS}; start"
        ):
            start(parallel=self.parallel_with(data_parallel_size=2))

    def test_progress_reaches_the_driver(self, start: Any) -> None:
        """What a worker reports while loading arrives at its own rank, and its end always does."""
        seen: list[tuple[int, int, int, str]] = []
        start(workers.ProgressWorker, on_progress=lambda *report: seen.append(report))
        eventually(lambda: (RANK, 3, 3, "tensors") in seen)
        assert [(RANK, done, 3, "tensors") for done in range(4)] == seen


for _name in NOT_HERE:
    assert callable(getattr(ExecutorContract, _name))
    setattr(TestAllRanks, _name, None)
