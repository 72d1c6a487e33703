"""A failed executor comes back, by request or by itself, and repeats no call."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exec_core as ec
from exec_core.testing import eventually, faults, snapshot, workers

Launch = Callable[..., ec.Executor]


def kill(executor: ec.Executor, rank: int = 1) -> None:
    """Kills a worker, and returns when the executor has failed and its failure has been handled."""
    generation = executor.generation
    os.kill(executor.workers[rank].pid, signal.SIGKILL)
    eventually(lambda: executor.state is not ec.State.READY or executor.generation != generation)


def test_ten_restarts(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    """Ten times in a row: fresh processes, the same start sequence, the next generation, in the logs too."""
    executor = launch(2, log={"level": "info"})
    pids, before = set(), snapshot()
    for generation in range(1, 11):
        pids |= {worker.pid for worker in executor.workers}
        kill(executor)
        executor.restart()
        assert generation == executor.generation
        assert [(0, generation), (1, generation)] == executor.collective_rpc("where", args=(generation,))
        assert [["init_device", "load_model"]] * 2 == executor.collective_rpc(lambda worker: worker.journal)
        executor.collective_rpc(lambda worker: worker.context.log.info("in the worker"))

    assert 20 == len(pids)
    eventually(lambda: gc.collect() >= 0 and not snapshot().added_since(before), every_s=0.01)  # open as it still is
    executor.shutdown()
    records = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    ready = [record["generation"] for record in records if record["event"] == "executor ready"]
    assert list(range(11)) == ready
    inside = [(record["rank"], record["generation"]) for record in records if record["event"] == "in the worker"]
    assert [(rank, generation) for generation in range(1, 11) for rank in (0, 1)] == sorted(
        inside, key=lambda i: i[::-1]
    )


def test_call_in_flight_is_not_repeated(launch: Launch, tmp_path: Path) -> None:
    """A call that was in flight at a death fails, and no later generation runs it again."""
    journal = tmp_path / "journal"

    def write_and_wait(worker: Any) -> None:
        with journal.open("a") as file:
            file.write(f"{worker.context.rank}\n")
        time.sleep(faults.FOREVER_S)

    executor = launch(2, rpc={"max_restarts": 1})
    future = executor.collective_rpc(write_and_wait, non_block=True)
    queued = executor.collective_rpc(write_and_wait, non_block=True)
    eventually(lambda: journal.exists() and 2 == len(journal.read_text().split()))
    kill(executor)
    eventually(lambda: executor.state is ec.State.READY)

    assert [ec.WorkerDiedError] * 2 == [type(future.exception(30)), type(queued.exception(30))]
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))
    assert ["0", "1"] == sorted(journal.read_text().split())


def test_restarts_by_itself_are_counted(launch: Launch) -> None:
    """With ``max_restarts=2`` it comes back twice, and the third death is final; each is told to the callbacks."""
    executor = launch(2, rpc={"max_restarts": 2})
    told: list[BaseException] = []
    executor.register_failure_callback(told.append)
    for generation in (1, 2):
        kill(executor)
        eventually(lambda generation=generation: (executor.state, executor.generation) == (ec.State.READY, generation))  # type: ignore[misc] # bound now
        assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))
    kill(executor)
    eventually(lambda: len(told) == 3)

    assert (ec.State.FAILED, 2) == (executor.state, executor.generation)
    with pytest.raises(ec.ExecutorFailedError, match="was killed by SIGKILL"):
        executor.collective_rpc("where")


def fragile(broken: Path) -> type[workers.EchoWorker]:
    """A worker that does not load on rank 1 once the file ``broken`` is there."""

    class Fragile(workers.EchoWorker):
        def load_model(self) -> None:
            if broken.exists() and self.context.rank == 1:
                raise ValueError(f"cannot load generation {self.context.generation}")

    return Fragile


def test_restart_that_fails(launch: Launch, tmp_path: Path) -> None:
    """When the workers do not come back, `restart` says why and the executor stays failed; it can be tried again."""
    broken = tmp_path / "broken"
    executor = launch(2, fragile(broken))
    broken.touch()
    kill(executor)
    for _ in range(2):
        with pytest.raises(ec.WorkerStartupError, match="rank 1 .* load_model: ValueError: cannot load"):
            executor.restart()
        assert ec.State.FAILED is executor.state
        with pytest.raises(ec.ExecutorFailedError, match="cannot load"):
            executor.collective_rpc("where")
    broken.unlink()
    executor.restart()

    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))
    assert 3 == executor.generation


def test_callback_after_a_restart_that_failed(launch: Launch, tmp_path: Path) -> None:
    """A failed restart is told to its caller, and at once to callbacks that come later; those before have heard of the death."""
    broken = tmp_path / "broken"
    executor = launch(2, fragile(broken))
    before: list[BaseException] = []
    after: list[BaseException] = []
    executor.register_failure_callback(before.append)
    broken.touch()
    kill(executor)
    eventually(lambda: before)
    with pytest.raises(ec.WorkerStartupError, match="cannot load") as caught:
        executor.restart()
    executor.register_failure_callback(after.append)
    eventually(lambda: after)

    assert [caught.value] == after
    assert [ec.WorkerDiedError] == [type(error) for error in before]


def test_restarts_that_run_out(launch: Launch, tmp_path: Path) -> None:
    """When no restart that is left succeeds, callbacks hear of the last failure, and of none on the way."""
    broken = tmp_path / "broken"
    executor = launch(2, fragile(broken), rpc={"max_restarts": 3})
    told: list[str] = []
    executor.register_failure_callback(lambda error: told.append(str(error)))
    broken.touch()
    kill(executor)
    eventually(lambda: len(told) == 2)

    assert (ec.State.FAILED, 3) == (executor.state, executor.generation)
    assert ("SIGKILL" in told[0], "cannot load generation 3" in told[1]) == (True, True)
    late: list[str] = []
    executor.register_failure_callback(lambda error: late.append(str(error)))
    eventually(lambda: late)
    assert told[1:] == late
    assert 2 == len(told)


def test_callback_whose_restart_fails(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A callback that restarts in vain gets the error itself; it is called again only when the executor has tried by itself."""
    broken = tmp_path / "broken"
    executor = launch(2, fragile(broken), rpc={"max_restarts": 1}, log={"level": "error"})
    told: list[str] = []
    raised: list[str] = []

    def restart(error: BaseException) -> None:
        told.append(str(error))
        try:
            executor.restart()
        except ec.WorkerStartupError as failure:
            raised.append(str(failure))
            raise

    executor.register_failure_callback(restart)
    broken.touch()
    kill(executor)
    records: list[dict[str, Any]] = []

    def logged() -> int:
        records.extend(json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{"))
        return sum(record["event"] == "failure callback raised" for record in records)

    eventually(lambda: logged() == 2)  # after the death, and after the one restart that was left

    assert ["SIGKILL" in told[0], "generation 2" in told[1]] == [True, True]
    assert ["generation 1" in raised[0], "generation 3" in raised[1]] == [True, True]
    assert (2, 2, 3) == (len(told), len(raised), executor.generation)
    failed = [record["exception"] for record in records if record["event"] == "restart failed"]
    assert (1, True) == (len(failed), failed[0].startswith("WorkerStartupError: rank 1"))


def test_callback_may_restart(launch: Launch) -> None:
    """A failure callback may bring the executor back."""
    executor = launch(2)
    executor.register_failure_callback(lambda error: executor.restart())
    kill(executor)
    eventually(lambda: executor.state is ec.State.READY and executor.generation == 1)

    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_callback_may_shut_down(launch: Launch) -> None:
    """A failure callback may close the executor."""
    executor = launch(2)
    executor.register_failure_callback(lambda error: executor.shutdown())
    kill(executor)
    eventually(lambda: executor.state is ec.State.CLOSED)

    with pytest.raises(ec.ExecutorClosedError):
        executor.restart()


def test_callback_that_raises(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    """A callback that raises keeps the others from nothing, and is logged."""
    executor = launch(2, log={"level": "error"})
    told: list[BaseException] = []
    executor.register_failure_callback(lambda error: 1 // 0)
    executor.register_failure_callback(told.append)
    kill(executor)
    eventually(lambda: told)

    eventually(lambda: "failure callback raised" in capfd.readouterr().err)


def test_death_during_a_restart(launch: Launch, tmp_path: Path) -> None:
    """A worker that dies in the restart makes that restart fail; with more allowed, the next one is tried by itself."""
    dying = tmp_path / "dying"

    class Dying(workers.EchoWorker):
        def load_model(self) -> None:
            if dying.exists() and self.context.rank == 0:
                dying.unlink()
                os.kill(os.getpid(), signal.SIGKILL)

    executor = launch(2, Dying, rpc={"max_restarts": 2})
    dying.touch()
    kill(executor)
    eventually(lambda: executor.state is ec.State.READY)

    assert 2 == executor.generation
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_shutdown_during_a_restart(launch: Launch, tmp_path: Path) -> None:
    """Closing an executor while it restarts ends the restart, at once."""
    loading = tmp_path / "loading"

    class Slow(workers.EchoWorker):
        def load_model(self) -> None:
            if self.context.generation:
                loading.touch()
                time.sleep(faults.FOREVER_S)

    executor = launch(2, Slow, rpc={"shutdown_timeout_s": 1.0})
    kill(executor)
    errors: list[BaseException] = []

    def restart() -> None:
        try:
            executor.restart()
        except ec.ExecutorError as error:
            errors.append(error)

    thread = threading.Thread(target=restart)
    thread.start()
    eventually(loading.exists)
    began = time.monotonic()
    executor.shutdown()
    took = time.monotonic() - began
    thread.join()

    assert ec.State.CLOSED is executor.state
    assert took < 10.0
    assert [ec.ExecutorClosedError] == [type(error) for error in errors]


def test_environment_of_the_next_generation(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart takes the driver's environment and working directory of that moment."""
    executor = launch(1)
    monkeypatch.setenv("SINCE_THE_RESTART", "yes")
    kill(executor, 0)
    executor.restart()

    assert ["yes"] == executor.collective_rpc(lambda worker: os.environ.get("SINCE_THE_RESTART"))


def test_private_directories_of_the_next_generation(launch: Launch) -> None:
    """After a death the workers' private directories are gone, and the next ones are elsewhere, where nobody can guess."""
    executor = launch(2)
    roots = []
    for _ in range(2):
        paths = executor.collective_rpc(lambda worker: worker.context.private_dir)
        (root,) = {os.path.dirname(path) for path in paths}
        roots.append(root)
        kill(executor)
        executor.restart()
        assert not os.path.exists(root)

    ends = {root.rpartition("-")[2] for root in roots}
    assert (2, {16}) == (len(ends), set(map(len, ends)))
