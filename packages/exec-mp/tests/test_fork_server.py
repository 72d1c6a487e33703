"""The fork server: what it refuses, what a worker has from it, and that it can be ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy
import pytest

import exec_core as ec
import exec_mp
from exec_core.testing import eventually, leak_check
from exec_core.testing.leaks import descendants
from exec_core.testing.workers import EchoWorker

Launch = Callable[..., ec.Executor]

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory for modules to preload, and a fork server that has imported nothing yet."""
    exec_mp.stop_fork_server()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def servers() -> list[int]:
    """Children of this process: there is only the fork server."""
    return [pid for pid in descendants() if str(os.getpid()) == _parent(pid)]


def _parent(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
        return ""
    return stat.rpartition(")")[2].split()[1]


def test_preload_that_starts_threads_is_refused(launch: Launch, fresh: Path) -> None:
    """A module that starts a thread would leave locks that no worker could take: the error names ``preload``."""
    (fresh / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    )
    with pytest.raises(ec.WorkerStartupError, match=r"2 threads.*RpcConfig.preload") as caught:
        launch(1, rpc={"preload": ("threaded",)})

    assert ("launch", 0) == (caught.value.phase, caught.value.rank)
    exec_mp.stop_fork_server()


def test_spawn_does_not_mind_threads_of_the_server(launch: Launch, fresh: Path) -> None:
    """A fresh interpreter takes no locks over, so that is the way out."""
    (fresh / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    )
    with pytest.raises(ec.WorkerStartupError, match="start_method='spawn'"):
        launch(1, rpc={"preload": ("threaded",)})

    assert [(0, 1)] == launch(1, rpc={"start_method": "spawn"}).collective_rpc("where", args=(1,))
    exec_mp.stop_fork_server()


@pytest.mark.parametrize(
    ("source", "why"),
    [("raise ValueError('no licence')", "ValueError: no licence"), ("raise SystemExit(3)", "SystemExit: 3")],
)
def test_preload_that_raises(launch: Launch, fresh: Path, source: str, why: str) -> None:
    """A module that cannot be imported is an error that names it and says why; the server goes on."""
    (fresh / "broken.py").write_text(source + "\n")
    with pytest.raises(ec.WorkerStartupError, match=rf"module 'broken' of RpcConfig.preload .*{why}"):
        launch(1, rpc={"preload": ("broken",)})

    assert [(0, 1)] == launch(1).collective_rpc("where", args=(1,))


def test_preload_that_does_not_exist(launch: Launch) -> None:
    """So is one that is not there."""
    with pytest.raises(ec.WorkerStartupError, match=r"module 'no_such_module' .*ModuleNotFoundError"):
        launch(1, rpc={"preload": ("no_such_module",)})


def test_preload_is_imported_before_the_fork(launch: Launch, fresh: Path) -> None:
    """What is preloaded is there when the worker starts, and imported once for all."""
    (fresh / "preloaded.py").write_text("import os\nIMPORTED_IN = os.getpid()\n")
    executor = launch(2, rpc={"preload": ("preloaded",)})
    importers = executor.collective_rpc(lambda worker: sys.modules["preloaded"].IMPORTED_IN)

    assert 1 == len(set(importers))
    assert set(importers).isdisjoint(worker.pid for worker in executor.workers)
    executor.shutdown()
    exec_mp.stop_fork_server()


def test_one_server_for_all_executors(launch: Launch) -> None:
    """All executors of a process, one after the other or at once, have their workers from one server."""
    (server,) = servers()
    first, second = launch(1), launch(2)
    parents = first.collective_rpc(lambda worker: os.getppid()) + second.collective_rpc(lambda worker: os.getppid())

    assert [server] * 3 == parents
    assert [server] == servers()


def test_server_comes_back_when_it_is_needed(launch: Launch) -> None:
    """After its end, asked for or not, the next executor starts another."""
    exec_mp.stop_fork_server()
    exec_mp.stop_fork_server()
    assert [] == servers()
    assert [(0, 1)] == launch(1).collective_rpc("where", args=(1,))
    (server,) = servers()
    os.kill(server, signal.SIGKILL)
    eventually(lambda: [server] != servers() or _is_zombie(server))

    assert [(0, 2)] == launch(1).collective_rpc("where", args=(2,))


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return "Z" == stat.rpartition(")")[2].split()[0]


def test_nothing_is_left_after_its_end() -> None:
    """After ``stop_fork_server`` there is no process, no descriptor, no thread and no file."""
    exec_mp.stop_fork_server()
    with leak_check():
        config = ec.ExecutorConfig(
            worker_cls=EchoWorker,
            device=ec.DeviceConfig(device="cpu", distributed_backend="none"),
            rpc=ec.RpcConfig(preload=()),
            log=ec.LogConfig(level="critical"),
        )
        with ec.create_executor(config) as executor:
            executor.collective_rpc("where")
        exec_mp.stop_fork_server()


def test_worker_takes_over_the_drivers_state_of_now(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment, working directory, import path and umask are the driver's at the start, not at the server's."""
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.setenv("EXEC_TEST_NOW", "now")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    old = os.umask(0o027)
    try:
        executor = launch(1)
    finally:
        os.umask(old)

    def state(worker: Any) -> tuple[Any, ...]:
        import only_here  # type: ignore[import-not-found] # made above

        umask = os.umask(0)
        os.umask(umask)
        return os.environ["EXEC_TEST_NOW"], os.getcwd(), only_here.__name__, umask

    assert [("now", str(tmp_path), "only_here", 0o027)] == executor.collective_rpc(state)


@pytest.mark.parametrize("preload", ["numpy", "numpy.random"])
def test_worker_has_its_own_random_numbers(launch: Launch, fresh: Path, preload: str) -> None:
    """Workers do not share the server's random state, if it has one: not with each other, not from one start to the next."""

    def numbers(worker: Any) -> tuple[float, float]:
        import random

        return random.random(), float(numpy.random.random())  # noqa: NPY002, S311 # the global states are the point

    drawn = [
        number
        for _ in range(2)
        for pair in launch(2, rpc={"preload": (preload,)}).collective_rpc(numbers)
        for number in pair
    ]

    assert 8 == len(set(drawn))


def test_worker_imports_nothing_of_numpy_that_it_does_not_use(launch: Launch, fresh: Path) -> None:
    """Its random numbers are a dozen modules, which every worker would import for itself."""
    executor = launch(1, rpc={"preload": ("numpy",)})

    present = executor.collective_rpc(lambda worker: sys.modules.keys() & {"numpy", "numpy.random"})
    assert [{"numpy"}] == present


@pytest.mark.parametrize("chosen", [None, "glibc.malloc.perturb=85"])
def test_worker_does_not_see_how_the_server_allocates(
    launch: Launch, fresh: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """The server's setting of malloc is its own, gives way to the driver's, and is no variable of a worker or of what it starts."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", chosen)
    executor = launch(1)
    (server,) = servers()

    assert [chosen] == executor.collective_rpc(lambda worker: os.environ.get("GLIBC_TUNABLES"))
    environ = Path(f"/proc/{server}/environ").read_text(encoding="utf-8").split("\0")
    assert f"GLIBC_TUNABLES={chosen or 'glibc.malloc.hugetlb=1'}" in environ


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_worker_runs_exit_functions_but_not_those_of_torch(launch: Launch, tmp_path: Path, method: str) -> None:
    """What a worker has registered runs when it leaves; taking torch's operators apart would only copy memory."""

    def register(worker: Any) -> None:
        import atexit
        import weakref

        import torch

        def taken_apart(*args: Any) -> None:
            (tmp_path / "torch").touch()

        taken_apart.__module__ = torch.library.__name__
        weakref.finalize(torch, (tmp_path / "finalizer").touch)
        weakref.finalize(torch, taken_apart)
        atexit.register((tmp_path / "function").touch)

    executor = launch(1, rpc={"start_method": method})
    executor.collective_rpc(register)
    executor.shutdown()

    assert ["finalizer", "function"] == sorted(path.name for path in tmp_path.iterdir())


def test_worker_has_only_its_own_descriptors(launch: Launch) -> None:
    """A worker has no descriptor of another rank's, of the server's or of the driver's."""
    with open(os.devnull, encoding="ascii") as opened:
        os.set_inheritable(opened.fileno(), True)  # its only argument
        first, second = launch(3).collective_rpc(lambda worker: sorted(_targets()))[1:]

    assert first == second
    assert len(first) < 20


def _targets() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        found.append(target.partition(":[")[0])
    return found


def test_workers_are_no_children_of_multiprocessing(launch: Launch) -> None:
    """The host's `multiprocessing` knows nothing of the workers, and its start method is left alone."""
    program = """
import multiprocessing, threading
import exec_core as ec
from exec_core.testing.workers import EchoWorker
config = ec.ExecutorConfig(
    worker_cls=EchoWorker, device=ec.DeviceConfig(device="cpu", distributed_backend="none"),
    rpc=ec.RpcConfig(preload=()), log=ec.LogConfig(level="critical"),
)
with ec.create_executor(config):
    print(multiprocessing.active_children(), multiprocessing.get_start_method(allow_none=True))
print([thread.name for thread in threading.enumerate()])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert ["[] None", "['MainThread']"] == done.stdout.splitlines()
