"""Logs of driver and workers: each event one JSON object a line, on one standard error."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest

import exec_core as ec
import exec_mp

Launch = Callable[..., ec.Executor]

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

PROGRAM = """
import logging, os, sys
import exec_core as ec
from exec_core.testing.workers import EchoWorker

def talk(worker):
    worker.context.log.info("by structlog", step=1)
    worker.context.log.debug("too quiet")
    logging.getLogger("library").warning("by logging")
    os.write(2, b"by the operating system\\n")
    print("by print\\n", end="", flush=True)  # one write, whether or not the stream is buffered
    try:
        raise ValueError("two\\nlines")
    except ValueError:
        worker.context.log.exception("failed")

config = ec.ExecutorConfig(
    worker_cls=EchoWorker,
    parallel=ec.ParallelConfig(tensor_parallel_size=2),
    device=ec.DeviceConfig(device="cpu", distributed_backend="none"),
    rpc=ec.RpcConfig(preload=()),
    log=ec.LogConfig(format="{format}", worker_output="{output}"),
)
with ec.create_executor(config) as executor:
    executor.collective_rpc(talk)
    print([worker.pid for worker in executor.workers], os.getpid())
"""
KEYS = ["timestamp", "level", "event", "logger", "executor", "backend", "generation", "rank", "pid"]


def run(log_format: str, output: str = "log") -> tuple[list[int], list[str], str]:
    """Pids of workers and driver, lines on standard error, and standard output of the program above."""
    program = PROGRAM.replace("{format}", log_format).replace("{output}", output)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *said, pids = done.stdout.splitlines()
    numbers = [int(number) for number in pids.translate(str.maketrans("[],", "   ")).split()]
    return numbers, done.stderr.splitlines(), "\n".join(said)


def test_every_line_is_json() -> None:
    """Every line of driver and workers is one JSON object with time, level, event, rank and pid."""
    (first, second, driver), lines, said = run("json")
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]

    assert "" == said
    assert [KEYS] * len(events) == [list(event)[: len(KEYS)] for event in events]
    assert {(None, driver), (0, first), (1, second)} == {(event["rank"], event["pid"]) for event in events}
    assert {("mp", 0)} == {(event["backend"], event["generation"]) for event in events}
    for rank in (0, 1):
        mine = [event for event in events if event["rank"] == rank]
        assert {"by structlog", "by logging", "failed", "by print", "by the operating system"} == {
            event["event"] for event in mine
        }
        (failed,) = [event for event in mine if event["event"] == "failed"]
        assert ("error", True) == (failed["level"], "ValueError: two\nlines" in failed["exception"])
        (structured,) = [event for event in mine if event["event"] == "by structlog"]
        assert ("info", 1) == (structured["level"], structured["step"])


def test_driver_tells_its_life() -> None:
    """The driver's own events tell start and end, with how long they took."""
    (_, _, driver), lines, _ = run("json")
    told = [event for event in map(json.loads, lines) if event["pid"] == driver]

    assert ["executor starting", "executor ready", "executor closing", "executor closed"] == [e["event"] for e in told]
    assert all(event["duration_ms"] > 0 for event in (told[1], told[3]))


def test_console_is_for_a_person() -> None:
    """In console format each line says whose it is, and is no JSON."""
    _, lines, _ = run("console")

    assert any("[driver] executor ready" in line for line in lines)
    for rank in (0, 1):
        assert any(f"[rank {rank}] by structlog" in line for line in lines)
        assert any(f"[rank {rank}] by logging" in line for line in lines)


def test_inherited_output_is_the_drivers() -> None:
    """With ``worker_output="inherit"`` what workers print goes where the driver's output goes."""
    _, lines, said = run("json", "inherit")

    assert ["by print", "by print"] == said.splitlines()
    assert 2 == lines.count("by the operating system")
    events = [json.loads(line) for line in lines if line != "by the operating system"]
    assert {0, 1} == {event["rank"] for event in events if event["event"] == "by structlog"}


def test_every_key_reaches_the_hosts_logging() -> None:
    """Where the host has set up `logging`, a worker's events become its records, also those with keys that records have."""
    program = PROGRAM.replace("{format}", "auto").replace("{output}", "log")
    program = program.replace("step=1", 'step=1, name="n", args=1')
    host = "import logging; logging.basicConfig(level='INFO', format='%(levelname)s %(message)s %(name_)s %(args_)s')\n"
    filtered = "logging.getLogger().handlers[0].addFilter(lambda record: hasattr(record, 'name_'))\n"
    done = subprocess.run([sys.executable, "-c", host + filtered + program], capture_output=True, text=True, check=True)

    assert ["INFO by structlog n 1"] * 2 == done.stderr.splitlines()


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_what_was_printed_is_not_lost(launch: Launch, monkeypatch: pytest.MonkeyPatch, start_method: str) -> None:
    """A line that a worker has printed is there although the worker is killed at once."""
    exec_mp.stop_fork_server()
    monkeypatch.setenv("PYTHONUNBUFFERED", "")  # of the next one, and of its workers

    def print_and_die(worker: Any) -> None:
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ec.WorkerDiedError) as caught:
        launch(1, rpc={"start_method": start_method}).collective_rpc(print_and_die)

    assert ("last words",) == caught.value.last_log_lines
    exec_mp.stop_fork_server()
