"""A driver or a fork server that is killed: nothing of theirs stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

import exec_core as ec
import exec_mp
from exec_core.testing import eventually, faults
from exec_mp import _launcher

Launch = Callable[..., ec.Executor]

DRIVER = Path(__file__).parent / "programs" / "driver.py"
SOON_S = 5.0  # for what takes milliseconds on a quiet machine


@attrs.define
class Driver:
    """A driver of its own, and who must go with it."""

    pid: int
    others: list[int]
    bystanders: list[int]


@contextlib.contextmanager
def running(mode: str, *, before: tuple[str, ...] = ()) -> Iterator[Driver]:
    """`programs/driver.py` in ``mode``, once it is ready; ended afterwards whatever happens."""
    reading, writing = os.pipe()
    environment = {**os.environ, "TELL_FD": str(writing)}
    command = [*before, sys.executable, "-P", str(DRIVER), mode]
    with subprocess.Popen(command, env=environment, pass_fds=[writing], stderr=subprocess.DEVNULL) as process:
        os.close(writing)
        driver = Driver(process.pid, [], [])
        try:
            with os.fdopen(reading) as lines:
                for line in lines:
                    kind, *numbers = line.split()
                    if kind == "ready":
                        break
                    (driver.others if kind == "pid" else driver.bystanders).extend(map(int, numbers))
                yield driver
        finally:
            for pid in [process.pid, *driver.others, *driver.bystanders]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["idle", "call", "collective", "gil", "load", "thread"])
def test_driver_killed(mode: str) -> None:
    """The driver is killed: every worker, what it has started and the fork server are gone, whatever they were doing."""
    with running(mode) as driver:
        os.kill(driver.pid, signal.SIGKILL)
        faults.await_gone(driver.others, SOON_S)


def test_driver_killed_with_a_forked_child(tmp_path: Path) -> None:
    """A forked child of the driver holds its sockets open, and lives on; the workers do not."""
    with running("forked") as driver:
        os.kill(driver.pid, signal.SIGKILL)
        faults.await_gone(driver.others, SOON_S)

        assert [False] == [faults.is_gone(pid) for pid in driver.bystanders]


def test_driver_killed_in_a_pid_namespace() -> None:
    """Inside a PID namespace, where the numbers are others, the driver's end is noticed as well."""
    namespace = ("unshare", *(() if os.getuid() == 0 else ("--map-root-user",)), "--pid", "--fork", "--mount-proc")
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not allow PID namespaces")
    shell = ("sh", "-c", '"$@"; sleep 600', "sh")  # the namespace's first process, which would take all others along
    with running("call", before=(*namespace, *shell)) as driver:
        driver.others = []  # numbers of the namespace
        (first,) = children(driver.pid)
        (inner,) = children(first)
        everyone = descendants(inner)
        assert len(everyone) >= 7  # fork server, two workers, their two children each
        os.kill(inner, signal.SIGKILL)
        faults.await_gone(everyone, SOON_S)
        os.kill(first, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Pids of the children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    """Pids of its children, and of theirs."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


def test_fork_server_killed(launch: Launch) -> None:
    """The fork server is killed: all workers and what they started are gone, and every executor has failed for that reason."""
    executors = [launch(), launch()]
    server = _launcher.fork_server().pid
    pids = [worker.pid for executor in executors for worker in executor.workers]
    pids += executors[0].collective_rpc(faults.start_child)
    future = executors[0].collective_rpc(faults.nap, non_block=True)
    os.kill(server, signal.SIGKILL)
    faults.await_gone([server, *pids], SOON_S)

    error = future.exception(SOON_S)
    assert isinstance(error, ec.WorkerDiedError)
    assert f"the fork server (pid {server}) was killed by SIGKILL, and the workers with it" in str(error)
    for executor in executors:
        eventually(lambda executor=executor: executor.state is ec.State.FAILED)  # type: ignore[misc] # bound now
        with pytest.raises(ec.ExecutorFailedError, match="was killed by SIGKILL"):
            executor.check_health()
    executors[0].restart()
    assert [(0, 1), (1, 1)] == executors[0].collective_rpc("where", args=(1,))
    assert server != _launcher.fork_server().pid


@pytest.mark.parametrize("method", [faults.hold_gil, faults.collectives_for_ever], ids=["gil", "collective"])
def test_fork_server_killed_whatever_workers_do(launch: Launch, method: Callable[..., Any]) -> None:
    """The fork server's workers go with it also from C code and from a collective, and so do their children."""
    executor = launch(gloo=method is faults.collectives_for_ever)
    server = _launcher.fork_server().pid
    pids = [worker.pid for worker in executor.workers]
    pids += executor.collective_rpc(faults.start_child)
    executor.collective_rpc(method, non_block=True)
    eventually(lambda: all(worker.method for worker in executor.workers))
    os.kill(server, signal.SIGKILL)

    faults.await_gone([server, *pids], SOON_S)
    eventually(lambda: executor.state is ec.State.FAILED)
    with pytest.raises(ec.ExecutorFailedError, match="was killed by SIGKILL"):
        executor.check_health()


def test_fork_server_stopped(launch: Launch) -> None:
    """A fork server that does not run for a while keeps neither a death nor a shutdown waiting."""
    failed, closed = launch(), launch()
    server = _launcher.fork_server().pid
    pids = [worker.pid for executor in (failed, closed) for worker in executor.workers]
    os.kill(server, signal.SIGSTOP)
    try:
        with pytest.raises(ec.WorkerDiedError, match="exit code unknown") as caught:
            failed.collective_rpc(faults.exit_at_once, 10.0, args=(3, 1))
        failed.shutdown()
        closed.shutdown()
        faults.await_gone(pids, SOON_S)
    finally:
        os.kill(server, signal.SIGCONT)

    assert 1 == caught.value.rank


def test_ending_the_fork_server(launch: Launch) -> None:
    """`stop_fork_server` ends all workers of the process; their executors say so; the next executor starts another."""
    executor = launch()
    pids = [worker.pid for worker in executor.workers]
    exec_mp.stop_fork_server()
    exec_mp.stop_fork_server()

    faults.await_gone(pids, SOON_S)
    with pytest.raises(ec.ExecutorFailedError, match=r"the fork server \(pid \d+\) was stopped"):
        eventually(executor.check_health)
    assert [(0, 2), (1, 2)] == launch().collective_rpc("where", args=(2,))


def test_private_directories_go_with_the_fork_server(launch: Launch) -> None:
    """What workers keep in their private directories is swept also when the fork server can no longer do it."""
    executor = launch()
    (one, two) = executor.collective_rpc(lambda worker: worker.context.private_dir)
    os.kill(_launcher.fork_server().pid, signal.SIGKILL)
    eventually(lambda: executor.state is ec.State.FAILED)
    executor.shutdown()

    assert (False, False) == (Path(one).exists(), Path(two).exists())


def test_shutdown_with_a_forked_child(launch: Launch) -> None:
    """A forked child of the host, which holds copies of all sockets, keeps nothing alive."""
    executor = launch()
    pids = [worker.pid for worker in executor.workers]
    (private, _) = executor.collective_rpc(lambda worker: worker.context.private_dir)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        executor.shutdown()
        faults.await_gone(pids, SOON_S)
        assert not Path(private).exists()
        exec_mp.stop_fork_server()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
