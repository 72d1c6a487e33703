"""Rank 0 in the caller's process."""

from __future__ import annotations  # what those of a class in a function name is not sent along with it

import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch.distributed as dist

import exec_core as ec
import exec_mp
from exec_core.testing import Gate, eventually, faults, workers
from exec_core.testing.leaks import descendants

Launch = Callable[..., ec.Executor]

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

INLINE = {"driver_worker": "inline"}
SOON_S = 5.0  # for what takes milliseconds on a quiet machine


def error_of(call: Callable[[], Any]) -> BaseException:
    """What ``call`` raises."""
    try:
        value = call()
    except Exception as error:
        return error
    raise AssertionError(f"returned {value!r}")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A closed gate, opened after the test whatever happens."""
    gate = Gate(str(tmp_path))
    yield gate
    gate.open()


@pytest.fixture
def hosts_group() -> Iterator[None]:
    """A default process group that the host program has made."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined] # public, not listed
    yield
    dist.destroy_process_group()


def test_world_of_one_has_no_other_process(launch: Launch) -> None:
    """A world of one inline needs neither a fork server nor a thread."""
    exec_mp.stop_fork_server()
    before = threading.active_count()
    executor = launch(1, gloo=True, parallel=INLINE)

    assert [os.getpid()] == executor.collective_rpc(lambda worker: os.getpid())
    assert (0, "r") == executor.execute_model("r")
    assert (set(), before) == (descendants(), threading.active_count())


def test_blocking_call_runs_in_the_calling_thread(launch: Launch) -> None:
    """A blocking call runs rank 0 in the thread that makes it, a future runs it on a thread of ours."""
    executor = launch(2, parallel=INLINE)

    def thread_name(worker: Any) -> str:
        return threading.current_thread().name

    assert threading.current_thread().name == executor.collective_rpc(thread_name)[0]
    assert "exec-inline" == executor.collective_rpc(thread_name, non_block=True).result(30)[0]


def test_hosts_process_group_is_refused(launch: Launch, hosts_group: None) -> None:
    """A process that has a default group already cannot hold a rank of another world, and is told what to do."""
    with pytest.raises(ec.ConfigError, match=r"ParallelConfig.driver_worker must be 'process'.*got 'inline'"):
        launch(2, gloo=True, parallel=INLINE)

    assert dist.is_initialized()


def test_hosts_process_group_does_not_matter_without_groups(launch: Launch, hosts_group: None) -> None:
    """Where the workers join no process group, the host's own is not in the way."""
    assert [(0, 1), (1, 1)] == launch(2, parallel=INLINE).collective_rpc("where", args=(1,))
    assert dist.is_initialized()


def test_late_rank_in_another_process_times_out(launch: Launch, gate: Gate) -> None:
    """A rank in a process of its own that does not answer makes the call time out, once rank 0 has done its part."""
    executor = launch(2, parallel=INLINE)
    with pytest.raises(ec.RpcTimeoutError) as caught:
        executor.collective_rpc(workers.wait_at, 0.5, args=(gate, 1))
    gate.open()

    assert ((0,), (1,)) == (caught.value.answered_ranks, caught.value.pending_ranks)
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_late_rank_0_returns_its_value(launch: Launch, gate: Gate) -> None:
    """Rank 0 cannot be interrupted: a call that is complete when it returns, however late, returns its values."""
    executor = launch(2, parallel=INLINE)
    opener = threading.Timer(0.1, gate.open)
    opener.start()

    assert [0, 1] == executor.collective_rpc(workers.wait_at, 0.05, args=(gate, 0))
    opener.join()


def test_cancelled_future_does_not_run(launch: Launch, gate: Gate) -> None:
    """A future of rank 0 alone that is cancelled before its turn is not run."""
    executor = launch(2, parallel=INLINE)
    held = executor.collective_rpc(workers.wait_at, args=(gate,), ranks=[0], non_block=True)
    waiting = executor.collective_rpc("note", args=(("cancelled",),), ranks=[0], non_block=True)
    gate.entered([0])

    assert waiting.cancel()
    gate.open()
    assert [0] == held.result(30)
    assert [[], []] == executor.collective_rpc("entries", args=("cancelled",))


def test_sent_future_cannot_be_cancelled(launch: Launch, gate: Gate) -> None:
    """A call that other ranks have been sent runs."""
    executor = launch(2, parallel=INLINE)
    future = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)

    assert not future.cancel()
    gate.open()
    assert [0, 1] == future.result(30)


def test_environment_of_rank_0_is_the_hosts(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """``worker_env`` of an inline rank is set in the host's process, since it has no other."""
    monkeypatch.setenv("EXEC_TEST_INLINE", "before")
    launch(2, parallel=INLINE, worker_env=({"EXEC_TEST_INLINE": "rank 0"}, {}))

    assert "rank 0" == os.environ["EXEC_TEST_INLINE"]


@pytest.mark.parametrize("driver_worker", ["inline", "process"])
@pytest.mark.parametrize("options", [{}, {"non_block": True}], ids=["blocking", "future"])
def test_arguments_go_with_their_call(launch: Launch, driver_worker: str, options: dict[str, Any]) -> None:
    """Nothing keeps the arguments of a call that is over, also before the garbage collector comes."""
    executor = launch(2, parallel={"driver_worker": driver_worker})
    argument = {1, 2}
    gone = weakref.ref(argument)
    gc.disable()
    try:
        value = executor.collective_rpc("where", args=(argument,), reply_ranks=[], **options)
        assert [] == (value.result(30) if options else value)
        del argument, value
        eventually(lambda: gone() is None)  # the thread that has run it lets go of it last
    finally:
        gc.enable()


def test_directories_of_the_other_ranks_stay_while_they_end(launch: Launch, tmp_path: Path) -> None:
    """What rank 0 has in its private directory goes with rank 0, what the others have when all have ended."""

    class Leaving(workers.EchoWorker):
        def shutdown(self) -> None:
            own = Path(self.context.private_dir)
            if self.context.rank:
                eventually(lambda: not (own.parent / "rank-0").exists())
                (tmp_path / "seen").write_text((own / "file").read_text())

    executor = launch(2, Leaving, parallel=INLINE)
    paths = executor.collective_rpc(lambda worker: worker.context.private_dir)
    Path(paths[1], "file").write_text("there")
    executor.shutdown()

    assert "there" == (tmp_path / "seen").read_text()
    assert not Path(paths[0]).parent.exists()


@pytest.mark.parametrize("options", [{}, {"non_block": True}], ids=["blocking", "future"])
def test_rank_0_leaves_a_collective_when_a_rank_dies(launch: Launch, options: dict[str, Any]) -> None:
    """A death gets rank 0 out of a collective of gloo's, also when another rank is stopped and would never leave it."""
    executor = launch(3, gloo=True, parallel=INLINE)
    _, stopped, killed = [worker.pid for worker in executor.workers]

    def call() -> Any:
        value = executor.collective_rpc(faults.collective_without, args=(2,), **options)
        return value.result(SOON_S) if options else value

    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(error_of, call)
        eventually(lambda: ["collective_without"] * 3 == [worker.method for worker in executor.workers])
        os.kill(stopped, signal.SIGSTOP)
        os.kill(killed, signal.SIGKILL)

        died = error.result(SOON_S)
    assert isinstance(died, ec.WorkerDiedError)
    assert (2, "SIGKILL") == (died.rank, died.signal_name)
    eventually(lambda: executor.workers[0].method is None, deadline_s=SOON_S)
    faults.await_gone([stopped, killed], SOON_S)


def stuck_group() -> type[dist.ProcessGroup]:
    """A class made where it is used: one over a class of torch's cannot be sent by value with every torch."""

    class Stuck(dist.ProcessGroup):
        """A process group whose collectives end when it is aborted only, as NCCL's do when a peer is gone."""

        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            super().__init__(rank, size)  # type: ignore[call-arg] # the one for classes of one's own, which the stub lacks
            self.aborted = threading.Event()

        def getBackendName(self) -> str:  # noqa: N802 # torch's name
            return "stuck"

        @property
        def group_name(self) -> Any:
            return dist.distributed_c10d._world.pg_names[self]

        def allreduce(self, *args: Any) -> Any:
            assert self.aborted.wait(faults.FOREVER_S)
            raise RuntimeError("the collective was aborted")

        def abort(self) -> None:
            self.aborted.set()

    return Stuck


class Sticking(workers.EchoWorker):
    """Joins such a group."""

    def init_device(self) -> None:
        if "stuck" not in dist.Backend.backend_list:
            dist.Backend.register_backend("stuck", stuck_group(), devices=["cpu"])
        super().init_device()


def test_rank_0_leaves_a_collective_that_only_an_abort_ends(launch: Launch) -> None:
    """A death aborts the process groups of rank 0, whose backend would not notice it by itself."""
    device = ec.DeviceConfig(device="cpu", threads_per_worker=1, distributed_backend="stuck")
    executor = launch(2, Sticking, device=device, parallel=INLINE, rpc={"preload": ("torch",)})
    future = executor.collective_rpc(faults.collective_without, args=(1,), non_block=True)
    eventually(lambda: ["collective_without"] * 2 == [worker.method for worker in executor.workers])
    os.kill(executor.workers[1].pid, signal.SIGKILL)

    assert isinstance(future.exception(SOON_S), ec.WorkerDiedError)
    eventually(lambda: executor.workers[0].method is None, deadline_s=SOON_S)
    executor.restart()
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_process_group_that_outlives_its_executor(launch: Launch, tmp_path: Path) -> None:
    """What the host has kept of rank 0's process groups does nothing to files of the host's when it goes at last."""
    executor = launch(2, gloo=True, parallel=INLINE)
    kept = executor.collective_rpc(lambda worker: worker.context.groups.world.device_group, ranks=[0])
    number = int(executor._group.inits[0].distributed_init_method.rpartition("/")[2])  # type: ignore[union-attr] # ours
    executor.shutdown()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    with open(tmp_path / "hosts", "w+b") as file:
        os.dup2(file.fileno(), number)
        kept.clear()
        gc.collect()
        os.close(number)

    assert b"" == (tmp_path / "hosts").read_bytes()
