"""What is particular to one worker in the caller's process."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import attrs
import pytest
import torch
import torch.distributed as dist

import exec_core as ec
from exec_core import devices
from exec_core.testing import Gate, workers
from exec_core.testing.interrupts import interrupted
from exec_core.testing.leaks import descendants
from exec_core.testing.workers import EchoWorker
from exec_uniproc import UniProcExecutor

NO_GROUPS = ec.DeviceConfig(device="cpu", distributed_backend="none")
GROUPS = ec.DeviceConfig(device="cpu")


class Start(Protocol):
    """Starts executors that the fixture closes."""

    def __call__(self, worker_cls: Any = EchoWorker, **changes: Any) -> ec.Executor:
        """An executor with ``changes`` of `ExecutorConfig`'s fields."""


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts executors, closed after the test."""
    with ExitStack() as stack:

        def started(worker_cls: Any = EchoWorker, **changes: Any) -> ec.Executor:
            fields = {"device": NO_GROUPS, "log": ec.LogConfig(level="critical"), **changes}
            config = ec.ExecutorConfig(worker_cls=worker_cls, backend="uniproc", **fields)
            return stack.enter_context(ec.create_executor(config))

        yield started


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A closed gate, opened after the test whatever happens."""
    gate = Gate(str(tmp_path))
    yield gate
    gate.open()


def test_is_found_by_its_name(start: Start) -> None:
    """The backend ``uniproc`` is this class."""
    assert type(start()) is UniProcExecutor


def test_no_process_and_no_thread(start: Start) -> None:
    """Blocking calls need nothing but the caller's own thread."""
    before = descendants(), threading.active_count()
    executor = start(device=GROUPS)
    ran_in = executor.collective_rpc(lambda worker: (os.getpid(), threading.get_ident()))

    assert [(os.getpid(), threading.get_ident())] == ran_in
    assert (0, "r") == executor.execute_model("r")
    assert before == (descendants(), threading.active_count())


def test_everything_passes_by_reference(start: Start) -> None:
    """Worker keywords, arguments and results are the objects themselves, picklable or not."""
    lock, model = threading.Lock(), torch.nn.Linear(1, 1)
    executor = start(worker_kwargs={"lock": lock})

    assert executor.collective_rpc(lambda worker: worker.worker_kwargs["lock"])[0] is lock
    assert executor.collective_rpc("where", args=(model,))[0][1] is model
    assert executor.execute_model(lock)[1] is lock


def test_local_rank_is_the_device_index(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's local rank and device are the index of the device it was given."""
    monkeypatch.setattr(devices, "count_in_this_process", lambda: 4)

    class Deviceless(EchoWorker):
        def init_device(self) -> None:
            """There is no such device."""

    executor = start(Deviceless, device=ec.DeviceConfig(device="cuda", device_ids=(2,)))
    context = executor.collective_rpc(lambda worker: worker.context)[0]

    assert (0, 1, 2, "cuda:2") == (context.rank, context.world_size, context.local_rank, context.device_name)
    assert context.is_driver_worker


def test_world_of_one_for_torch(start: Start) -> None:
    """The worker joins a world of one, in which collectives work."""
    executor = start(device=GROUPS)

    assert [(0, 1)] == executor.collective_rpc(lambda worker: (dist.get_rank(), dist.get_world_size()))
    assert [0.0] == executor.collective_rpc(workers.add_up_ranks, args=("tp",))


def test_several_at_once(start: Start) -> None:
    """Several executors in one process have groups of their own, and each can go when it likes."""
    first, second, third = (start(device=GROUPS) for _ in range(3))
    first.shutdown()
    third.shutdown()

    assert [0.0] == second.collective_rpc(workers.add_up_ranks, args=("world",))
    second.shutdown()
    assert not dist.is_initialized()


def test_host_with_a_process_group(start: Start) -> None:
    """A host that has a default process group keeps it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined] # public, not listed
    try:
        before = dist.group.WORLD
        executor = start(device=GROUPS)
        assert [0.0] == executor.collective_rpc(workers.add_up_ranks, args=("tp",))
        executor.shutdown()
        assert dist.group.WORLD is before
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_more_than_one_rank_is_refused(start: Start, name: str) -> None:
    """Every larger world is refused, with the backend that can do it."""
    with pytest.raises(ec.ConfigError, match=rf"ParallelConfig.{name} must be 1 .* got 2; use backend 'mp'") as caught:
        start(parallel=attrs.evolve(ec.ParallelConfig(), **{name: 2}))  # type: ignore[arg-type] # one of three names

    assert (f"ParallelConfig.{name}", 2) == (caught.value.field, caught.value.value)


def test_too_few_devices(start: Start) -> None:
    """Asking for cuda where there is none says so, and starts nothing."""
    if devices.count_in_this_process():
        return
    with pytest.raises(ec.DeviceError, match="1 requested, 0 found"):
        start(device=ec.DeviceConfig(device="cuda"))


def test_healthy_while_it_runs(start: Start) -> None:
    """One process is healthy as long as it runs, and not any more when it is closed."""
    executor = start()
    executor.check_health()
    executor.shutdown()
    with pytest.raises(ec.ExecutorClosedError):
        executor.check_health()


def test_late_call_returns_its_value(start: Start, gate: Gate) -> None:
    """A method that runs cannot be interrupted: past its deadline the call returns when it does, with its value."""
    executor = start()
    opener = threading.Timer(0.05, gate.open)
    opener.start()

    assert [0] == executor.collective_rpc(workers.wait_at, 0.01, args=(gate,))
    opener.join()


def test_call_behind_another_times_out(start: Start, gate: Gate) -> None:
    """A call that does not get its turn within its deadline raises, and runs when its turn comes, as it would elsewhere."""
    executor = start()
    held = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
    gate.entered([0])
    with pytest.raises(ec.RpcTimeoutError, match="'note' took longer than 0.01 s"):
        executor.collective_rpc("note", 0.01, args=(("late",),))
    gate.open()

    assert [0] == held.result(30)
    assert [[("late",)]] == executor.collective_rpc("entries", args=("late",))


def test_cancelled_future_does_not_run(start: Start, gate: Gate) -> None:
    """A future that is cancelled before its turn is not run; one that runs cannot be cancelled."""
    executor = start()
    held = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
    waiting = executor.collective_rpc("note", args=(("cancelled",),), non_block=True)
    gate.entered([0])

    assert [False, True] == [held.cancel(), waiting.cancel()]
    gate.open()
    assert [0] == held.result(30)
    assert [[]] == executor.collective_rpc("entries", args=("cancelled",))


def test_shutdown_beside_a_running_method(start: Start, gate: Gate) -> None:
    """Closing does not wait for ever for a method that does not end; its worker is then left alone."""
    executor = start(rpc=ec.RpcConfig(shutdown_timeout_s=0.1))
    future = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
    gate.entered([0])
    executor.shutdown()

    assert isinstance(future.exception(30), ec.ExecutorClosedError)
    assert ec.State.CLOSED is executor.state
    gate.open()


def test_keyboard_interrupt_of_the_user_is_the_users(start: Start) -> None:
    """Ctrl-C in a blocking call is the user's own, not the worker's error, and the executor goes on."""
    executor = start()
    with pytest.raises(KeyboardInterrupt):
        executor.collective_rpc(workers.fail, args=(KeyboardInterrupt(),))

    assert [(0, 1)] == executor.collective_rpc("where", args=(1,))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # one that strikes in a finaliser is lost
@pytest.mark.parametrize("options", [{}, {"non_block": True}], ids=["blocking", "future"])
def test_interrupt_at_every_point(start: Start, options: dict[str, Any]) -> None:
    """Wherever Ctrl-C strikes in a call, the next ones get their own answers, and no place in flight is lost."""
    executor = start(rpc=ec.RpcConfig(timeout_s=20.0, max_in_flight=1))
    at = 0
    found: str | None = ""
    while found is not None:
        at += 1
        found = interrupted(lambda: executor.collective_rpc("where", args=(1,), **options), at)
        try:
            assert [(0, at)] == executor.collective_rpc("where", args=(at,))
            assert [(0, -at)] == executor.collective_rpc("where", args=(-at,), non_block=True).result(20)
        except Exception as error:
            error.add_note(f"after an interrupt at {found}")
            raise
    assert at > 10  # it had something to interrupt


def test_interrupted_wait_for_a_turn(start: Start, gate: Gate) -> None:
    """A caller whom Ctrl-C takes out of the queue keeps nobody behind it."""
    executor = start(rpc=ec.RpcConfig(timeout_s=20.0))
    held = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
    gate.entered([0])
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            executor.collective_rpc("where", args=(1,))
    finally:
        signal.signal(signal.SIGALRM, before)
    gate.open()
    held.result(20)

    assert [(0, 2)] == executor.collective_rpc("where", args=(2,))
