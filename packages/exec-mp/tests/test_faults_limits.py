"""Systems with narrow limits: what is asked for works, or is one clear error with nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import exec_core as ec
import exec_mp
from exec_core.testing import faults
from exec_mp import _oom

Launch = Callable[..., ec.Executor]

PROGRAM = """
import sys
import exec_core as ec
from exec_core.testing.workers import EchoWorker

try:
    with ec.create_executor(ec.ExecutorConfig(
        worker_cls=EchoWorker,
        parallel=ec.ParallelConfig(tensor_parallel_size=int(sys.argv[1])),
        device=ec.DeviceConfig(device="cpu", distributed_backend="none", threads_per_worker=1),
        rpc=ec.RpcConfig(preload=(), startup_timeout_s=30.0),
        log=ec.LogConfig(level="critical"),
    )) as executor:
        (rank, length), *_ = executor.collective_rpc(lambda worker, data: (worker.context.rank, len(data)), args=(bytes(3 << 20),))
        print("works", length, executor.collective_rpc("where", args=(bytes(1 << 20),))[0][1] == bytes(1 << 20))
except ec.ExecutorError as error:
    print(type(error).__name__, str(error).replace("\\n", " "))
"""
WORKS = "works 3145728 True\n"


def run(before: str, world: int = 2, prefix: tuple[str, ...] = ()) -> str:
    """What the program prints after the shell has run ``before``, which sets limits; it must end well and say nothing else."""
    done = subprocess.run(
        [*prefix, "sh", "-c", before + '; exec "$@"', "sh", sys.executable, "-P", "-c", PROGRAM, str(world)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


@pytest.mark.parametrize(("files", "world"), [(64, 2), (64, 8)])
def test_few_descriptors_are_enough(files: int, world: int) -> None:
    """Eight workers run with a limit of 64 open files."""
    assert WORKS == run(f"ulimit -n {files}", world)


@pytest.mark.parametrize("files", [12, 20, 28, 36])
def test_too_few_descriptors(files: int) -> None:
    """With fewer open files than it takes the error says so, whoever ran out of them."""
    said = run(f"ulimit -n {files}", 8)

    assert "WorkerStartupError" in said
    assert "open files" in said


@pytest.mark.parametrize("kib", [64_000_000, 4_000_000, 1_000_000])
def test_little_address_space(kib: int) -> None:
    """With little address space the shared mapping is smaller, and messages still fit."""
    assert WORKS == run(f"ulimit -v {kib}")


def test_small_files_only() -> None:
    """Where no file may be as large as the shared memory, the error names the limit."""
    said = run("ulimit -f 100")

    assert "no shared memory for 2 ranks" in said
    assert "ulimit -f" in said


@contextmanager
def mounts(*commands: str) -> Iterator[tuple[str, ...]]:
    """A prefix that runs a program with ``commands`` done in a mount namespace of its own."""
    prefix = ("unshare", "--mount", *(() if os.getuid() == 0 else ("--map-root-user",)), "sh", "-c")
    prefix += (" && ".join(commands) + ' && exec "$@"', "sh")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not allow mounts in a namespace")
    yield prefix


def test_small_shared_memory_filesystem() -> None:
    """A /dev/shm of one page, smaller than any container's, is enough: nothing is kept there."""
    with mounts("mount -t tmpfs -o size=4k tmpfs /dev/shm") as prefix:
        assert WORKS == run("true", prefix=prefix)


def test_read_only_temporary_directory() -> None:
    """Without a writable temporary directory executors work; who asks for a private one is told which cannot be made."""
    # What is in them stays: this may be one of the places where the environment is.
    present = [path for path in ("/tmp", "/var/tmp") if Path(path).exists()]  # noqa: S108
    read_only = [f"mount --bind {path} {path} && mount -o remount,ro,bind {path}" for path in present]
    with mounts(*read_only) as prefix:
        assert WORKS == run("cd /proc; export TMPDIR=/tmp", prefix=prefix)


def test_private_directory_that_cannot_be_made(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private directory that the system refuses is an error that names it, and the executor goes on."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc")
    executor = launch(1)
    with pytest.raises(OSError, match=r"/proc/exec-\d+"):
        executor.collective_rpc(lambda worker: worker.context.private_dir)

    assert [(0, 1)] == executor.collective_rpc("where", args=(1,))


@contextmanager
def process_limit(tasks: int) -> Iterator[str]:
    """A shell command that limits its processes and threads to ``tasks``."""
    group = Path("/sys/fs/cgroup/pids") / f"exec-mp-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("this system does not let us limit the number of processes")
    try:
        (group / "pids.max").write_text(str(tasks))
        yield f"echo $$ > {group}/cgroup.procs"
    finally:
        group.rmdir()


@pytest.mark.parametrize("tasks", [2, 3, 4, 6, 7])
def test_few_processes(tasks: int) -> None:
    """Where the system refuses a process or a thread, in the driver or in a worker, the error says so."""
    with process_limit(tasks) as limit:
        said = run(limit, 3)

    assert "WorkerStartupError" in said
    assert any(reason in said for reason in ("can't start new thread", "limit on processes", "limits on processes"))


@pytest.mark.parametrize(
    ("name", "after"),
    [
        *[(name, after) for name in ("memfd_create", "pipe2", "pidfd_open") for after in (0, 1, 3)],
        *[("eventfd", after) for after in (3, 4, 5)],
    ],
)
def test_system_refuses_a_descriptor(launch: Launch, monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Whichever descriptor the system refuses, the error says what and why, and what had been made is gone again."""
    if name == "pidfd_open":
        exec_mp.stop_fork_server()
    original, calls = getattr(os, name), iter(range(100))

    def refuse(*args: Any) -> Any:
        if next(calls) >= after:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return original(*args)

    monkeypatch.setattr(os, name, refuse)
    try:
        executor = launch(2)
    except ec.WorkerStartupError as error:
        assert "the system refuses: [Errno 12] Cannot allocate memory; check the limits" in str(error)  # noqa: PT017
    else:
        assert next(calls) <= after  # it needs no more of them
        executor.shutdown()
    monkeypatch.undo()

    assert [(0, 1), (1, 1)] == launch(2).collective_rpc("where", args=(1,))


def test_message_that_does_not_fit_into_memory(launch: Launch) -> None:
    """A message for which there is no address space is refused before anything is sent."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        executor = launch(1)
        (limit,) = {executor._group._channel.geometry.arena_bytes}  # type: ignore[union-attr] # an mp group
        with pytest.raises((ec.MessageTooLargeError, MemoryError)):
            executor.collective_rpc("where", args=(memoryview(bytearray(limit + 1)),))
        assert [(0, 1)] == executor.collective_rpc("where", args=(1,))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# The out-of-memory killer


def test_counters_that_rise_are_a_hint(tmp_path: Path) -> None:
    """The first counter that has risen is what the hint names."""
    nearest, machine = tmp_path / "memory.events", tmp_path / "vmstat"
    nearest.write_text("low 0\noom 3\noom_kill 3\n")
    machine.write_text("oom_kill 7\n")
    watch = _oom.OomWatch([str(tmp_path / "absent"), str(nearest), str(machine)])

    assert "" == watch.hint()
    machine.write_text("oom_kill 8\n")
    assert f"(oom_kill in {machine} rose from 7 to 8)" in watch.hint()
    nearest.write_text("oom 9\noom_kill 4\n")
    assert f"(oom_kill in {nearest} rose from 3 to 4)" in watch.hint()


def test_counters_of_this_machine() -> None:
    """This machine has counters, and nothing has been killed for memory just now."""
    assert any(_oom._count(file) is not None for file in _oom._counter_files())
    assert "" == _oom.OomWatch().hint()


def test_worker_killed_for_memory(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that the out-of-memory killer has ended is said to be, with the counter that tells."""
    counter = tmp_path / "memory.events"
    counter.write_text("oom_kill 0\n")
    monkeypatch.setattr(_oom, "_counter_files", lambda: [str(counter)])

    def killed(worker: Any) -> None:
        counter.write_text("oom_kill 1\n")
        os.kill(os.getpid(), 9)

    with pytest.raises(ec.WorkerDiedError, match="probably the kernel's out-of-memory killer") as caught:
        launch(1).collective_rpc(killed)
    assert ("SIGKILL", "killed" in str(caught.value.method)) == (caught.value.signal_name, True)
    with pytest.raises(ec.WorkerDiedError) as other:
        launch(1).collective_rpc(faults.exit_at_once, args=(1,))
    assert "out-of-memory" not in str(other.value)


def test_worker_that_takes_more_than_its_cgroup_has() -> None:
    """The kernel's own killer, in a cgroup with a limit, is recognised."""
    group = Path("/sys/fs/cgroup/memory") / f"exec-mp-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(400 << 20))
    except OSError:
        pytest.skip("this system does not let us make a memory cgroup")
    taken = "executor.collective_rpc(lambda worker: len(bytearray(b'x') * (1 << 30)))"
    program = PROGRAM.replace('print("works"', f'{taken}\n        print("works"')
    try:
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", sys.executable, "-P", "-c", program, "1"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        group.rmdir()

    assert "WorkerDiedError rank 0" in done.stdout, done.stderr
    assert "probably the kernel's out-of-memory killer" in done.stdout
