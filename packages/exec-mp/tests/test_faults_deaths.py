"""A worker that dies: who is told what, and how soon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cloudpickle
import pytest

import exec_core as ec
from exec_core.testing import eventually, faults, workers
from exec_core.testing.sync import Gate

Launch = Callable[..., ec.Executor]

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

SOON_S = 5.0  # for what takes milliseconds on a quiet machine


def pids_of(executor: ec.Executor) -> list[int]:
    """Process of each rank."""
    return [worker.pid for worker in executor.workers]


def busy(executor: ec.Executor, method: str, ranks: int) -> bool:
    """Whether so many ranks are in ``method``."""
    return ranks == sum(worker.method == method for worker in executor.workers)


def error_of(call: Callable[[], Any]) -> BaseException:
    """What ``call`` raises."""
    try:
        value = call()
    except Exception as error:
        return error
    raise AssertionError(f"returned {value!r}")


def test_death_in_a_collective_reaches_every_pending_call(launch: Launch) -> None:
    """One of four ranks is killed in a collective: threads, futures and tasks all get the death, with all its facts."""
    executor = launch(4, gloo=True)
    pids = pids_of(executor)
    with ThreadPoolExecutor(4) as pool:
        inside = pool.submit(error_of, lambda: executor.collective_rpc(faults.collective_without, args=(1,)))
        eventually(lambda: busy(executor, "collective_without", 4))
        threads = [inside, *(pool.submit(error_of, lambda: executor.collective_rpc("where")) for _ in range(3))]
        futures = [executor.collective_rpc("where", non_block=True) for _ in range(3)]

        async def tasks() -> list[Any]:
            waiting = [asyncio.create_task(executor.collective_rpc_async("where")) for _ in range(3)]
            await asyncio.sleep(0)
            os.kill(pids[2], signal.SIGKILL)
            return await asyncio.gather(*waiting, return_exceptions=True)

        errors = [*asyncio.run(tasks()), *(f.exception(SOON_S) for f in futures), *(t.result(SOON_S) for t in threads)]

    assert [ec.WorkerDiedError] * 10 == [type(error) for error in errors]
    assert {(2, pids[2], None, "SIGKILL", "collective_without")} == {
        (error.rank, error.pid, error.exit_code, error.signal_name, error.method) for error in errors
    }
    assert len(set(map(id, errors))) == len(errors)  # each can be raised without changing another
    who = f"rank 2 (pid {pids[2]}) was killed by SIGKILL in 'collective_without'"
    assert f"{who}; call restart() or shutdown(), or set RpcConfig.max_restarts" == str(errors[0])
    faults.await_gone(pids, SOON_S)


def test_callback_health_and_next_call_after_a_death(launch: Launch) -> None:
    """After a death the callback has run once, health and the next call raise with the death as cause."""
    executor = launch()
    told: list[BaseException] = []
    executor.register_failure_callback(told.append)
    with pytest.raises(ec.WorkerDiedError) as caught:
        executor.collective_rpc(faults.kill_itself, kwargs={"rank": 1})

    assert ec.State.FAILED is executor.state
    for refused in (lambda: executor.collective_rpc("where"), executor.check_health, lambda: executor.execute_model(1)):
        error = error_of(refused)
        assert isinstance(error, ec.ExecutorFailedError)
        assert str(caught.value) == str(error.__cause__)
    eventually(lambda: told)
    late: list[BaseException] = []
    executor.register_failure_callback(late.append)  # too late, so at once
    eventually(lambda: late)
    assert ([str(caught.value)], [str(caught.value)]) == ([str(e) for e in told], [str(e) for e in late])


def test_death_in_the_log(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    """The event of a death has the error as text, the method, and the number of the call that the worker was in."""
    executor = launch(log={"level": "error"})
    executor.collective_rpc("where")
    with pytest.raises(ec.WorkerDiedError) as caught:
        executor.collective_rpc(faults.kill_itself, kwargs={"rank": 1})
    records: list[dict[str, Any]] = []

    def logged() -> list[dict[str, Any]]:
        records.extend(json.loads(line) for line in capfd.readouterr().err.splitlines())
        return [record for record in records if record["event"] == "executor failed"]

    eventually(logged)
    (record,) = logged()

    assert (f"WorkerDiedError: {caught.value}", "kill_itself") == (record["exception"], record["method"])
    assert isinstance(record["request_id"], int)
    assert caught.value.request_id == record["request_id"]
    assert "error" not in record


def test_death_while_idle(launch: Launch) -> None:
    """A worker that is killed while nobody calls is noticed, and named as idle."""
    executor = launch()
    told: list[BaseException] = []
    executor.register_failure_callback(told.append)
    os.kill(pids_of(executor)[1], signal.SIGTERM)
    eventually(lambda: told)

    assert "was killed by SIGTERM while idle" in str(told[0])
    eventually(lambda: ["dead", "dead"] == [worker.state for worker in executor.workers])


@pytest.mark.parametrize(
    ("end", "exit_code", "signal_name"),
    [
        pytest.param(lambda worker: os._exit(3), 3, None, id="os._exit"),
        pytest.param(lambda worker: os.abort(), None, "SIGABRT", id="abort"),
        pytest.param(lambda worker: os.kill(os.getpid(), 40), None, "signal 40", id="real-time signal"),
    ],
)
def test_ends_of_other_kinds(launch: Launch, end: Any, exit_code: int | None, signal_name: str | None) -> None:
    """An exit code or a signal, whatever it is, is in the error."""
    with pytest.raises(ec.WorkerDiedError) as caught:
        launch().collective_rpc(end, ranks=[1])

    assert (1, exit_code, signal_name) == (caught.value.rank, caught.value.exit_code, caught.value.signal_name)


def test_segfault_brings_its_trace(launch: Launch) -> None:
    """A segmentation fault's Python stack, and what the worker had written before, are in the error."""
    executor = launch(1)
    executor.collective_rpc(faults.say, args=("before the end",))
    with pytest.raises(ec.WorkerDiedError, match="SIGSEGV") as caught:
        executor.collective_rpc(faults.crash)

    lines = "\n".join(caught.value.last_log_lines)
    assert "before the end" in lines
    assert "Fatal Python error: Segmentation fault" in lines
    assert "in crash" in lines
    assert lines.splitlines()[-1] in str(caught.value)


def test_last_lines_of_a_worker_that_writes_to_a_file(launch: Launch, tmp_path: Any) -> None:
    """With ``worker_output="files"`` the last lines come from the worker's file."""
    executor = launch(1, log={"worker_output": "files", "directory": str(tmp_path)})
    executor.collective_rpc(faults.say, args=("in a file",))
    with pytest.raises(ec.WorkerDiedError) as caught:
        executor.collective_rpc(faults.exit_at_once, args=(4,))

    assert "in a file" in caught.value.last_log_lines


def test_death_wins_over_the_error_of_a_peer(launch: Launch) -> None:
    """A peer's "connection closed" often comes before the victim's death is known: the death is what is raised."""
    executor = launch(2, gloo=True)
    future = executor.collective_rpc(faults.collectives_for_ever, non_block=True)
    eventually(lambda: busy(executor, "collectives_for_ever", 2))
    os.kill(pids_of(executor)[1], signal.SIGKILL)

    error = future.exception(SOON_S)
    assert isinstance(error, ec.WorkerDiedError)
    assert (1, "SIGKILL") == (error.rank, error.signal_name)


def test_error_waits_for_a_worker_that_is_slow_to_die(launch: Launch) -> None:
    """The kernel reports a death when it has freed the memory; an error of a peer in that time does not hide it."""

    def take(worker: Any) -> None:
        worker.memory = bytearray(1 << 30)
        for page in range(0, 1 << 30, 4096):
            worker.memory[page] = 1

    executor = launch(2, gloo=True)
    executor.collective_rpc(take, ranks=[1])
    future = executor.collective_rpc(faults.collectives_for_ever, non_block=True)
    eventually(lambda: busy(executor, "collectives_for_ever", 2))
    os.kill(pids_of(executor)[1], signal.SIGKILL)

    error = future.exception(SOON_S)
    assert isinstance(error, ec.WorkerDiedError)
    assert (1, "SIGKILL") == (error.rank, error.signal_name)


def fail_on_device(worker: Any, why: str = "", rank: int = 0, how: str = "call") -> Any:
    """Raises on ``rank``, of which CUDA then says ``why`` it does nothing more; it is well without. The others wait."""
    import torch

    class Stream:
        def query(self) -> bool:
            if why:
                raise RuntimeError(f"{why}\nCompile with more options for more to read.")
            return False

    class Output:
        def get_output(self) -> Any:
            raise ValueError("told to fail")

    class Value:
        def __reduce__(self) -> Any:
            raise ValueError("told to fail")

    if worker.context.rank != rank:
        return faults.nap(worker)
    worker.context.device_name = "cuda:0"
    vars(torch.cuda).update(
        set_device=lambda _: None, is_initialized=lambda: True, is_current_stream_capturing=lambda: False,
        current_stream=lambda _: Stream(),
    )  # fmt: skip
    return {"output": Output, "value": Value, "call": Output().get_output}[how]()


@pytest.mark.parametrize("how", ["call", "output", "value"])
def test_rank_whose_device_is_lost_leaves(launch: Launch, how: str) -> None:
    """Nothing would ever work there again. The call gets the error that began it, later ones that the rank is gone, and why."""
    executor = launch(2)
    pids = pids_of(executor)
    lost = "CUDA error: device-side assert triggered"
    error = error_of(lambda: executor.collective_rpc(fail_on_device, args=(lost, 1, how)))

    assert "told to fail" in str(error)
    eventually(lambda: executor.state is ec.State.FAILED)
    died = error_of(lambda: executor.collective_rpc("where")).__cause__
    assert isinstance(died, ec.WorkerDiedError)
    assert (1, pids[1], 1) == (died.rank, died.pid, died.exit_code)
    assert str(died).endswith(f"rank 1 leaves: CUDA refuses it everything from now on, after {lost}")
    faults.await_gone(pids, SOON_S)
    executor.restart()
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


@pytest.mark.parametrize("why", ["", "CUDA error: operation not permitted when stream is capturing"])
def test_rank_whose_device_works_stays(launch: Launch, why: str) -> None:
    """An error of a worker's is no reason to leave, nor what CUDA cannot answer at this moment."""
    executor = launch(1)

    for _ in range(2):
        assert "told to fail" == str(error_of(lambda: executor.collective_rpc(fail_on_device, args=(why,))))
    assert [(0, 1)] == executor.collective_rpc("where", args=(1,))


def test_first_of_two_deaths_is_named(launch: Launch) -> None:
    """A worker that leaves because another was killed is not the one that is named."""

    def leave(worker: Any) -> None:
        import torch
        import torch.distributed as dist

        try:
            while True:
                dist.all_reduce(torch.ones(4))
        except RuntimeError:
            os._exit(7)

    executor = launch(2, gloo=True)
    future = executor.collective_rpc(leave, non_block=True)
    eventually(lambda: busy(executor, "test_first_of_two_deaths_is_named.<locals>.leave", 2))
    os.kill(pids_of(executor)[0], signal.SIGKILL)

    error = future.exception(SOON_S)
    assert isinstance(error, ec.WorkerDiedError)
    assert (0, "SIGKILL") == (error.rank, error.signal_name)


@pytest.mark.parametrize("phase", ["launch", "load"])
def test_death_while_starting(launch: Launch, phase: str) -> None:
    """A worker that dies while it starts is a start-up error naming rank, phase and how it died; nothing stays."""

    class Dying(workers.EchoWorker):
        def __init__(self, context: Any, **kwargs: Any) -> None:
            super().__init__(context)
            if phase == "launch" and context.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        def load_model(self) -> None:
            if self.context.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ec.WorkerStartupError, match="was killed by SIGKILL") as caught:
        launch(2, Dying)

    assert (1, {"launch": "init_worker", "load": "load_model"}[phase]) == (caught.value.rank, caught.value.phase)
    assert isinstance(caught.value.__cause__, ec.WorkerDiedError)


def test_children_of_a_worker_go_with_it(launch: Launch) -> None:
    """When a worker dies, processes that workers have started go too, also those in a session of their own."""
    executor = launch()
    children = [
        *executor.collective_rpc(faults.start_child),
        *executor.collective_rpc(faults.start_child, kwargs={"own_session": True}),
    ]
    assert not any(map(faults.is_gone, children))
    os.kill(pids_of(executor)[0], signal.SIGKILL)

    faults.await_gone(children, SOON_S)


def test_worker_whose_channel_is_broken_dies(launch: Launch) -> None:
    """A worker that has closed descriptors that are not its own ends, and says why, instead of being silent for ever."""

    def close_all(worker: Any) -> None:
        os.closerange(3, 64)

    executor = launch()
    with pytest.raises((ec.WorkerDiedError, ec.ExecutorFailedError)) as caught:
        executor.collective_rpc(close_all, ranks=[1])
        eventually(
            lambda: executor.collective_rpc("where") is None
        )  # it may be the next call that finds out, or be refused

    error = caught.value if isinstance(caught.value, ec.WorkerDiedError) else caught.value.__cause__
    assert isinstance(error, ec.WorkerDiedError)
    assert (1, 1) == (error.rank, error.exit_code)
    assert any("Bad file descriptor" in line for line in error.last_log_lines)


def test_failed_executor_is_quiet(launch: Launch) -> None:
    """After a death the driver waits without using the processor."""
    executor = launch()
    with pytest.raises(ec.WorkerDiedError):
        executor.collective_rpc(faults.exit_at_once, args=(1, 0))
    faults.await_gone(pids_of(executor), SOON_S)
    began, used = time.monotonic(), time.process_time()
    eventually(lambda: time.monotonic() - began > 0.5, every_s=0.1)

    assert time.process_time() - used < 0.1


def test_death_while_another_call_reports_stacks(launch: Launch) -> None:
    """Time-outs of futures with their stack reports do not keep a death from being noticed."""
    executor = launch(2)
    slow = [executor.collective_rpc(faults.hold_gil, 0.2, non_block=True) for _ in range(3)]
    waiting: Future[Any] = executor.collective_rpc("where", non_block=True)
    eventually(lambda: busy(executor, "hold_gil", 2))
    calls = executor._group._calls  # type: ignore[union-attr] # ours
    eventually(lambda: [call.name for call in calls.in_flight.values() if not call.finished] == ["where"])
    began = time.monotonic()
    os.kill(pids_of(executor)[1], signal.SIGKILL)

    assert isinstance(waiting.exception(SOON_S), ec.WorkerDiedError)
    assert time.monotonic() - began < 1.0
    assert [ec.RpcTimeoutError] * 3 == [type(future.exception(SOON_S)) for future in slow]


def test_deaths_while_eight_threads_call(launch: Launch, tmp_path: Any) -> None:
    """Threads that call without a pause each end with the death or with the refusal after it, and none is forgotten."""
    executor = launch(2, rpc={"max_in_flight": 4})
    started = threading.Semaphore(0)

    def call(number: int) -> BaseException:
        started.release()
        while True:
            try:
                assert [(0, number), (1, number)] == executor.collective_rpc("where", args=(number,))
            except ec.ExecutorError as error:
                return error

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(call, number) for number in range(8)]
        for _ in calls:
            started.acquire()
        os.kill(pids_of(executor)[0], signal.SIGKILL)
        errors = [one.result(SOON_S) for one in calls]

    assert {type(error) for error in errors} <= {ec.WorkerDiedError, ec.ExecutorFailedError}


def test_ranks_that_wait_at_a_gate_are_stopped(launch: Launch, tmp_path: Any) -> None:
    """Ranks of a failed executor are gone although they were in the middle of their own work."""
    executor = launch(3)
    gate = Gate(tmp_path)
    pids = pids_of(executor)
    future = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
    gate.entered([0, 1, 2])
    os.kill(pids[1], signal.SIGKILL)

    faults.await_gone(pids, SOON_S)
    assert isinstance(future.exception(SOON_S), ec.WorkerDiedError)
