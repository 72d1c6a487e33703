"""What the fork server writes: events of the driver's log, and what it wrote last is in the error of its end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import exec_mp
from exec_core.testing import eventually

PROGRAM = """
import os, signal, sys
import exec_core as ec
import exec_mp
from exec_core.testing import faults
from exec_core.testing.workers import EchoWorker

log_format, output, when = sys.argv[1:]
if when == "early":
    exec_mp.prestart(("preloaded",))
config = ec.ExecutorConfig(
    worker_cls=EchoWorker,
    parallel=ec.ParallelConfig(tensor_parallel_size=2),
    device=ec.DeviceConfig(device="cpu", distributed_backend="none"),
    rpc=ec.RpcConfig(preload=("preloaded",), start_method="spawn" if when == "early" else "forkserver"),
    log=ec.LogConfig(format=log_format, worker_output=output),
)
try:
    with ec.create_executor(config) as executor:
        server = exec_mp._launcher.fork_server().pid
        print(server)
        if when == "killed":
            os.kill(server, signal.SIGABRT)
            executor.collective_rpc(faults.nap)
except ec.ExecutorError as error:
    print(type(error).__name__, error)
"""

CHATTY = """
import ctypes, os, warnings
print("by print")
warnings.warn("by warnings")
os.write(2, b"by the operating system\\n")
ctypes.CDLL(None).puts(b"by C")
os.register_at_fork(after_in_child=lambda: print("in a fork"))
print("without an end", end="")
"""

BROKEN = """
from exec_mp import _forkserver

def threads():
    raise RuntimeError("out of order")

print("before the end")
_forkserver._threads = threads
"""


class Done(NamedTuple):
    """Standard output and standard error of a driver that has ended."""

    said: str
    lines: list[str]

    def events(self) -> list[dict[str, Any]]:
        """All of standard error, of which each line must be JSON; then what the fork server's output has become."""
        events = [json.loads(line) for line in self.lines]
        return [event for event in events if event["logger"] == "fork_server.output"]


def run(directory: Path, source: str, log_format: str = "json", output: str = "log", when: str = "late") -> Done:
    """The program above with ``source`` as the module that is preloaded."""
    (directory / "preloaded.py").write_text(source)
    path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", PROGRAM, log_format, output, when]
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=env)
    return Done(done.stdout, done.stderr.splitlines())


@pytest.mark.parametrize(("output", "when"), [("log", "late"), ("log", "early"), ("inherit", "late")])
def test_every_line_of_the_fork_server_is_json(tmp_path: Path, output: str, when: str) -> None:
    """What a preloaded module writes is an event, once, whatever it writes with, and also if no executor was there yet."""
    done = run(tmp_path, CHATTY, output=output, when=when)
    events = done.events()

    assert {int(done.said)} == {event["pid"] for event in events}
    assert {("info", None, "mp", 0)} == {(e["level"], e["rank"], e["backend"], e["generation"]) for e in events}
    text = "\n".join(event["event"] for event in events)
    once = ["by print", "UserWarning: by warnings", "by the operating system", "by C", "without an end"]
    assert [1] * len(once) == [text.count(said) for said in once]
    assert 2 == text.count("in a fork")  # by each worker, which has not its own output yet


def test_console_is_for_a_person(tmp_path: Path) -> None:
    """In console format it is a line like the driver's."""
    lines = run(tmp_path, CHATTY, "console").lines

    assert 1 == sum("[driver] by print" in line and "fork_server.output" in line for line in lines)


@pytest.mark.parametrize(
    ("source", "how", "last"),
    [
        pytest.param(
            'import ctypes\nprint("before the end")\nctypes.string_at(0)\n',
            "was killed by SIGSEGV while waiting for the fork server to be ready",
            ["before the end", "Fatal Python error: Segmentation fault", "preloaded.py"],
            id="segfault",
        ),
        pytest.param(
            'import os\nprint("before the end")\nos._exit(3)\n',
            "exited with code 3 while waiting for the fork server to be ready",
            ["before the end"],
            id="exit",
        ),
        pytest.param(
            BROKEN,
            "exited with code 1 while waiting for a fork",
            ["before the end", "Traceback", "RuntimeError: out of order"],
            id="exception",
        ),
    ],
)
def test_fork_server_that_ends_at_the_start(tmp_path: Path, source: str, how: str, last: list[str]) -> None:
    """What a fork server wrote last is in the error of a start that it did not survive, and each line is an event."""
    done = run(tmp_path, source)
    events = "\n".join(event["event"] for event in done.events())

    assert done.said.startswith("WorkerStartupError")
    for part in (how, *last):
        assert part in done.said
    assert [1] * len(last) == [events.count(part) for part in last]


def test_fork_server_that_ends_later(tmp_path: Path) -> None:
    """So it is when the workers are gone with it."""
    done = run(tmp_path, 'print("before the end")', when="killed")
    events = "\n".join(event["event"] for event in done.events())

    assert re.search(
        r"was killed by SIGABRT, and the workers with it; call .*; its last lines:\n  before the end\n", done.said
    )
    assert (1, True) == (events.count("Fatal Python error: Aborted"), "Fatal Python error: Aborted" in done.said)


def test_fork_server_does_not_wait_for_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes as much as it likes while nobody is there to read."""
    loaded = tmp_path / "loaded"
    (tmp_path / "loud.py").write_text(
        f"for _ in range(4000):\n    print('x' * 1000)\nopen({str(loaded)!r}, 'w').close()\n"
    )
    exec_mp.stop_fork_server()
    monkeypatch.syspath_prepend(tmp_path)
    exec_mp.prestart(("loud",))

    eventually(loaded.exists)
    exec_mp.stop_fork_server()
