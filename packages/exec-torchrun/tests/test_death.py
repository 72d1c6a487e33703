"""A rank is killed: what the others say, and how the job comes back."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "programs" / "death.py"


def free_port() -> int:
    """A port for the job to meet at, as an administrator would choose one."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(("victim", "where"), [(2, "collective"), (0, "idle")])
def test_the_others_raise_and_name_the_dead_rank(tmp_path: Path, victim: int, where: str) -> None:
    """Rank 2 is killed while others wait for it in a collective, or rank 0 while they are done: all raise `WorkerDiedError`.

    No launcher is there to end them first: the variables are set by hand.
    """
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    environ = {**os.environ, **world, "RECORDS": os.fspath(tmp_path), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, PROGRAM, str(victim), where],
                    env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for rank in range(3)
        ]
        for process in processes:
            stack.callback(process.kill)
        outputs = [process.communicate(timeout=60)[0] for process in processes]

    pid = processes[victim].pid
    assert [-9 if rank == victim else 0 for rank in range(3)] == [p.returncode for p in processes], outputs
    for rank in range(3):
        if rank != victim:
            check_survivor(tmp_path, rank, victim, pid)


def check_survivor(directory: Path, rank: int, victim: int, pid: int) -> None:
    """What a rank recorded that was not killed."""
    records: dict[str, Any] = {}
    for line in (directory / f"rank-{rank}.jsonl").read_text().splitlines():
        records.update(json.loads(line))
    died = records["died"]
    assert ("WorkerDiedError", victim, pid, "die") == (died["type"], died["rank"], died["pid"], died["method"])
    assert f"rank {victim} (pid {pid}) is gone" in died["text"]
    assert died["seconds"] < 10.0  # a collective may take 20 s there
    assert ("failed", True) == (records["state"], records["heard"])
    assert "ExecutorFailedError" == records["next"]["type"]
    assert (None, False) == (records["closing"]["value"], records["left_over"])


def test_torchrun_brings_the_job_back(torchrun: Any) -> None:
    """A rank is killed in a call; with ``--max-restarts`` torchrun starts all ranks again, and they meet again."""
    job = torchrun(2, "comes_back.py", options=("--max-restarts", "1"))

    assert [1.0, 1.0] == job.of_all("sum_0")
    assert [1.0, 1.0] == job.of_all("sum_1")
    assert [1, 1] == job.of_all("done_in")
