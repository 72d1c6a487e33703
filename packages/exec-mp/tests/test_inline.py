"""Rank 0 in the caller's process."""

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import exec_core as ec
import exec_mp
from exec_core.testing import Gate, eventually, workers
from exec_core.testing.leaks import descendants

Launch = Callable[..., ec.Executor]

INLINE = {"driver_worker": "inline"}


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
        executor.collective_rpc(workers.wait_at, 0.05, args=(gate, 1))
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
