"""The contract of errors: what a worker raises, and who raised it."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from exec_core.errors import RemoteTraceback, WorkerError
from exec_core.executor import Executor
from exec_core.lifecycle import State
from exec_core.testing import workers
from exec_core.testing.base import ContractBase
from exec_core.testing.sync import Gate


class FailureContract(ContractBase):
    """Errors of worker code arrive whole, and harm nothing else."""

    def test_error_keeps_its_type(self, executor: Executor) -> None:
        """What a worker raises arrives as the original type with its arguments."""
        with pytest.raises(KeyError) as caught:
            executor.collective_rpc(workers.fail, args=(KeyError("layer", 3), self.last()))

        assert caught.value.args == ("layer", 3)

    def test_error_says_where(self, executor: Executor) -> None:
        """A note names rank, process and method."""
        pids = [worker.pid for worker in executor.workers]
        with pytest.raises(ValueError, match="wrong") as caught:
            executor.collective_rpc(workers.fail, args=(ValueError("wrong"), self.last()))

        assert f"rank {self.last()} (pid {pids[self.last()]}) in fail" in caught.value.__notes__

    def test_error_of_a_method_by_name_says_which(self, executor: Executor) -> None:
        """The note of an error in a method called by name has that name."""
        with pytest.raises(ValueError, match="step") as caught:
            executor.execute_model(ValueError("step"))

        assert any(note.endswith("in execute_model") for note in caught.value.__notes__)

    def test_error_brings_the_remote_traceback(self, executor: Executor) -> None:
        """The traceback in the worker is the cause of an error from another process; in the caller's it is the error's own."""
        with pytest.raises(ValueError, match="wrong") as caught:
            executor.collective_rpc(workers.fail, args=(ValueError("wrong"), self.last()))

        if self.last() in self.local_ranks:
            assert caught.traceback[-1].name == "fail"
        else:
            assert isinstance(caught.value.__cause__, RemoteTraceback)
            assert "raise error\nValueError: wrong" in str(caught.value.__cause__)

    def test_error_keeps_its_own_cause_and_notes(self, executor: Executor) -> None:
        """An error's own notes survive, and its own cause is in the remote traceback."""

        def fail(worker: Any) -> None:
            try:
                raise KeyError("first")
            except KeyError as first:
                error = ValueError("second")
                error.add_note("a note of its own")
                raise error from first

        with pytest.raises(ValueError, match="second") as caught:
            executor.collective_rpc(fail, ranks=[self.last()])

        assert "a note of its own" in caught.value.__notes__
        if self.last() not in self.local_ranks:
            assert "KeyError: 'first'" in str(caught.value.__cause__)

    def test_error_of_a_class_that_only_the_caller_has(self, executor: Executor) -> None:
        """An exception class defined in a function travels there and back and is the caller's own."""

        class LocalError(Exception):
            pass

        with pytest.raises(LocalError):
            executor.collective_rpc(workers.fail, args=(LocalError("x"),))

    def test_error_of_a_rank_that_was_not_asked(self, executor: Executor) -> None:
        """An error on a rank whose value was not asked for is raised by that very call."""
        others = [rank for rank in self.world() if rank != self.last()]
        with pytest.raises(ValueError, match="unasked"):
            executor.collective_rpc(workers.fail, args=(ValueError("unasked"), self.last()), reply_ranks=others)

    def test_error_of_several_ranks(self, executor: Executor) -> None:
        """When several ranks fail, one error is raised and its notes list the others."""
        with pytest.raises(ValueError, match="all") as caught:
            executor.collective_rpc(workers.fail, args=(ValueError("all"),))

        notes = "\n".join(caught.value.__notes__)
        assert [True] * len(self.world()) == [f"rank {rank} (pid" in notes for rank in self.world()]

    def test_error_does_not_wait_for_the_others(self, executor: Executor, gate: Gate) -> None:
        """The error of one rank is raised while others are still inside, and says who they are."""
        if self.last() == 0 or self.last() in self.local_ranks or 0 in self.local_ranks:
            return  # needs two ranks that can be waited for apart

        def fail_or_wait(worker: Any) -> None:
            if worker.context.rank == 0:
                gate.wait(0)
            else:
                gate.entered([0])
                raise ValueError("early")

        with pytest.raises(ValueError, match="early") as caught:
            executor.collective_rpc(fail_or_wait, 30.0)

        assert any("ranks [0] are still inside" in note for note in caught.value.__notes__)
        assert State.READY is executor.state
        gate.open()
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", 30.0, args=(1,))

    def test_executor_goes_on_after_an_error(self, executor: Executor) -> None:
        """After a worker's error the executor is READY and the next call gets its own answer."""
        for method in (workers.fail, "execute_model", "no_such_method"):
            with pytest.raises((ValueError, AttributeError)):
                executor.collective_rpc(method, args=() if method == "no_such_method" else (ValueError("x"),))
            assert State.READY is executor.state
            assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_unknown_method_names_class_and_method(self, executor: Executor) -> None:
        """A method that the worker does not have is an AttributeError naming class and method."""
        with pytest.raises(AttributeError, match="'EchoWorker' object has no attribute 'no_such_method'"):
            executor.collective_rpc("no_such_method")

    def test_wrong_arguments_are_a_type_error(self, executor: Executor) -> None:
        """Arguments that the method does not take are the TypeError that Python makes of them."""
        with pytest.raises(TypeError, match="where"):
            executor.collective_rpc("where", args=(1, 2, 3))

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("key"), GeneratorExit("gen")], ids=repr)
    def test_only_exceptions_keep_their_type(self, executor: Executor, error: BaseException) -> None:
        """A worker's SystemExit or KeyboardInterrupt arrives as `WorkerError` and ends neither worker nor caller."""
        kind = type(error)
        future = executor.collective_rpc(
            workers.fail_with, args=(lambda: kind(*error.args), self.last()), non_block=True
        )
        arrived = future.exception(30)

        assert isinstance(arrived, WorkerError)
        assert (self.last(), "fail_with", kind.__name__) == (arrived.rank, arrived.method, arrived.type_name)
        assert f"rank {self.last()} (pid {arrived.pid}) in 'fail_with': {kind.__name__}" in str(arrived)
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_system_exit_of_a_blocking_call(self, executor: Executor) -> None:
        """A worker's SystemExit does not end a caller that waits for it, not even one that shares its process."""
        with pytest.raises(WorkerError, match="SystemExit: 3"):
            executor.collective_rpc(workers.fail_with, args=(lambda: SystemExit(3), self.last()))

    @pytest.mark.parametrize(
        ("make", "type_name", "why"),
        [
            (lambda: workers.UnpicklableError("held"), "UnpicklableError", "cannot be pickled"),
            (lambda: workers.TwoArgumentError("held", 7), "TwoArgumentError", "cannot be loaded"),
        ],
        ids=["pickled", "loaded"],
    )
    def test_error_that_does_not_travel(self, executor: Executor, make: Any, type_name: str, why: str) -> None:
        """An error that cannot be pickled there or loaded here arrives as `WorkerError` with type, text and traceback."""
        expected = Exception if self.last() in self.local_ranks else WorkerError
        with pytest.raises(expected, match="held") as caught:
            executor.collective_rpc(workers.fail_with, args=(make, self.last()))

        assert any(f"rank {self.last()} (pid" in note for note in caught.value.__notes__)
        if isinstance(caught.value, WorkerError):
            assert type_name == caught.value.type_name
            assert why in str(caught.value)
            assert f"{type_name}: held" in caught.value.traceback
            assert f"{type_name}: held" in str(caught.value.__cause__)
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_error_whose_text_raises(self, executor: Executor) -> None:
        """An exception that cannot even say what it is still arrives, and harms nobody else."""

        class Mute(Exception):
            def __str__(self) -> str:
                raise ZeroDivisionError

        future = executor.collective_rpc(workers.fail_with, args=(Mute, self.last()), non_block=True)

        assert "Mute" in f"{type(future.exception(30))} {future.exception()!r}"
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_common_errors_of_libraries_keep_their_type(self, executor: Executor) -> None:
        """Errors with attributes of their own arrive with them."""

        def fail(worker: Any) -> None:
            subprocess.run(["/bin/sh", "-c", "exit 4"], check=True)

        with pytest.raises(subprocess.CalledProcessError) as called:
            executor.collective_rpc(fail, ranks=[self.last()])
        with pytest.raises(FileNotFoundError) as missing:
            executor.collective_rpc(lambda worker: os.stat("/no/such/file"), ranks=[self.last()])

        assert called.value.returncode == 4
        assert missing.value.filename == "/no/such/file"

    def test_workers_own_output_is_no_answer(self, executor: Executor) -> None:
        """A worker that prints does not disturb its replies."""
        executor.collective_rpc(lambda worker: print("a line", flush=True))

        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))
