"""The host program is left alone, whatever it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import exec_core as ec
from exec_core.testing import faults, workers

Launch = Callable[..., ec.Executor]

SCRIPT = """
import exec_core as ec

class Mine(ec.Worker):
    def where(self, x):
        return self.context.rank, x

config = ec.ExecutorConfig(
    worker_cls=Mine,
    parallel=ec.ParallelConfig(tensor_parallel_size=2),
    device=ec.DeviceConfig(device="cpu", distributed_backend="none"),
    rpc=ec.RpcConfig(preload=()),
    log=ec.LogConfig(level="warning"),
)
with ec.create_executor(config) as executor:
    print(executor.collective_rpc("where", args=(7,)), flush=True)
"""
ANSWER = "[(0, 7), (1, 7)]\n"


def run(command: list[str], **options: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
    return done.returncode, done.stdout, done.stderr


def test_script_without_a_main_guard(tmp_path: Path) -> None:
    """A script that starts an executor at its top level, with a worker class of its own."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)

    assert (0, ANSWER, "") == run([sys.executable, str(path)])


def test_script_on_standard_input() -> None:
    """A program that Python reads from standard input, which the workers leave alone."""
    rest = "import sys\nprint(sys.stdin.read())\n"

    assert (0, ANSWER + "\n", "") == run([sys.executable, "-"], input=SCRIPT + rest)


def test_program_on_the_command_line() -> None:
    """A program given with -c."""
    assert (0, ANSWER, "") == run([sys.executable, "-c", SCRIPT])


def test_daemonic_child_of_multiprocessing(tmp_path: Path) -> None:
    """A daemonic `multiprocessing` child, which may have no children of its own by that module's rules."""
    path = tmp_path / "script.py"
    program = (
        "import multiprocessing\n\n"
        f"def work():\n    exec({SCRIPT!r}, {{'__name__': 'work'}})\n\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('{}').Process(target=work, daemon=True)\n"
        "    process.start()\n    process.join()\n    raise SystemExit(process.exitcode)\n"
    )
    for method in ("fork", "spawn", "forkserver"):
        path.write_text(program.replace("{}", method, 1) if "{}" in program else program)

        assert (0, ANSWER, "") == run([sys.executable, str(path)]), method


def test_host_without_standard_streams() -> None:
    """A program whose three standard streams are closed."""
    result = "import os\nos.makedirs(os.environ['DONE'])\n"
    done = Path(os.environ["TMPDIR"]) / "done"
    program = "def show(answer, flush):\n    pass\n" + SCRIPT.replace("print(", "show(") + result
    code, _, _ = run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program],
                     env={**os.environ, "DONE": str(done)})  # fmt: skip

    assert (0, True) == (code, done.exists())
    done.rmdir()


def test_host_whose_log_nobody_reads(launch: Launch) -> None:
    """A driver whose stderr is a broken pipe still sees deaths and closes."""
    program = SCRIPT + (
        "    import os, sys\n"
        "    reading, writing = os.pipe()\n    os.close(reading)\n    os.dup2(writing, 2)\n"
        "    os.kill(executor.workers[0].pid, 9)\n"
        "    try:\n        [executor.collective_rpc('where', args=(1,)) for _ in range(10**6)]\n"
        "    except ec.ExecutorError as error:\n        print(type(error).__name__)\n"
    )
    code, out, _ = run([sys.executable, "-c", program])

    assert (0, True) == (code, out.removeprefix(ANSWER) in {"WorkerDiedError\n", "ExecutorFailedError\n"})


def test_start_in_threads_and_tasks(launch: Launch) -> None:
    """Executors can be started from a thread that then ends, and from a task of a running event loop."""
    with ThreadPoolExecutor(1) as pool:
        of_thread = pool.submit(launch).result(60)

    async def main() -> list[Any]:
        executor = launch()
        return list(await executor.collective_rpc_async("where", args=(1,)))

    assert [(0, 1), (1, 1)] == asyncio.run(main()) == of_thread.collective_rpc("where", args=(1,))


def test_working_directory_hides_no_standard_module(tmp_path: Path) -> None:
    """Files in the working directory with names of the standard library's modules are not what workers import."""
    for name in ("struct", "random", "pickle", "socket", "signal"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the wrong module')\n")

    assert (0, ANSWER, "") == run([sys.executable, "-P", "-c", SCRIPT], cwd=tmp_path)


TERMINAL = SCRIPT.replace("ec.Worker", "EchoWorker").replace("import exec_core as ec", """
import exec_core as ec
from exec_core.testing import faults
from exec_core.testing.workers import EchoWorker
""") + "    executor.collective_rpc(faults.nap)\n"  # fmt: skip


def test_ctrl_c_in_a_terminal() -> None:
    """Ctrl-C reaches the driver alone: one traceback, its own, none of a worker, and the program is over."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["setsid", "--ctty", "--wait", sys.executable, "-c", TERMINAL],
        stdin=theirs, stdout=theirs, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        try:
            while ANSWER.strip().encode() not in shown:
                shown += os.read(ours, 4096)
            # It may be in the call or just before it: the answer is the same.
            os.write(ours, b"\x03")
            with contextlib.suppress(OSError):  # how a terminal says that its last user has left
                while data := os.read(ours, 4096):
                    shown += data
        finally:
            os.close(ours)
            process.kill()

    text = shown.decode().replace("\r", "")
    assert (1, 1) == (text.count("Traceback (most recent call last)"), text.count("KeyboardInterrupt")), text
    assert "worker" not in text.replace("_worker", "").lower().split("traceback")[0], text
    assert process.returncode in (-signal.SIGINT, 130)


def test_workers_may_write_to_the_drivers_terminal() -> None:
    """What workers print reaches a terminal that stops other background processes which write to it (``stty tostop``)."""
    script = SCRIPT.replace('level="warning"', 'level="warning", worker_output="inherit"').replace(
        "return self", "print('by a worker', flush=True); return self"
    )
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[3] |= termios.TOSTOP
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    with subprocess.Popen(
        ["setsid", "--ctty", "--wait", sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            with contextlib.suppress(OSError):  # how a terminal says that its last user has left
                while select.select([ours], [], [], 30.0)[0] and (data := os.read(ours, 4096)):
                    shown += data
        finally:
            os.close(ours)
            process.kill()

    assert 2 == shown.count(b"by a worker")
    assert ANSWER.strip().encode() in shown


def test_host_logging_that_raises(launch: Launch) -> None:
    """A structlog configuration of the host that raises on every event does not keep a death from being noticed."""
    program = (
        "import structlog\n"
        "def bad(*args):\n    raise ValueError('bad processor')\n"
        + SCRIPT.replace(
            "with ec.create_executor(config) as executor:\n",
            "executor = ec.create_executor(config)\nstructlog.configure(processors=[bad])\nexecutor._log = structlog.get_logger()\n"
            "if True:\n",
        )
        + "    import os\n    os.kill(executor.workers[0].pid, 9)\n"
        "    try:\n        [executor.collective_rpc('where', args=(1,)) for _ in range(10**6)]\n"
        "    except ec.ExecutorError as error:\n        print(type(error).__name__)\n    os._exit(0)\n"
    )
    code, out, err = run([sys.executable, "-c", program])

    assert (0, True) == (code, out.removeprefix(ANSWER) in {"WorkerDiedError\n", "ExecutorFailedError\n"}), err


def test_workers_ignore_the_keyboard(launch: Launch) -> None:
    """SIGINT to a worker, from a terminal or a notebook, is not its business."""
    executor = launch(2)
    for worker in executor.workers:
        os.kill(worker.pid, signal.SIGINT)

    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_worker_may_start_children(launch: Launch) -> None:
    """A worker may run programs and `multiprocessing` children of its own."""

    def children(worker: Any) -> tuple[str, int]:
        import multiprocessing

        text = subprocess.run(["echo", "hello"], capture_output=True, text=True, check=True).stdout
        process = multiprocessing.get_context("fork").Process(target=os._exit, args=(3,))
        process.start()
        process.join()
        return text, process.exitcode or 0

    assert [("hello\n", 3)] * 2 == launch(2).collective_rpc(children)


def test_worker_may_have_executors(launch: Launch) -> None:
    """A worker may run an executor of its own; when the worker is killed, everything below goes with it."""

    def nested(worker: Any) -> list[int]:
        worker.executor = ec.create_executor(
            ec.ExecutorConfig(
                worker_cls=workers.EchoWorker,
                device=ec.DeviceConfig(device="cpu", distributed_backend="none"),
                rpc=ec.RpcConfig(preload=()),
                log=ec.LogConfig(level="critical"),
            )
        )
        return [os.getpid(), *worker.executor.collective_rpc(faults.pid_of)]

    executor = launch(1)
    ((outer, inner),) = executor.collective_rpc(nested)
    os.kill(outer, signal.SIGKILL)

    faults.await_gone([outer, inner], 10.0)
