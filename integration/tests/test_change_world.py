"""Replicas in processes of their own join one world and leave it again, on every backend; the model stays."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "programs" / "change_world.py"
Seen = tuple[int, list[dict[str, Any]]]  # tensor-parallel size, and what each replica has seen

LAUNCHERS = {
    "uniproc": ("uniproc", 1, [sys.executable]),
    "mp": ("mp", 2, [sys.executable]),
    "torchrun": (
        "torchrun",
        2,
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ),
}


def free_ports(count: int) -> list[int]:
    """Ports for the worlds to meet at, as an administrator would choose them."""
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in socks]


@pytest.fixture(scope="module", params=LAUNCHERS)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Two replicas, started apart, that go through all worlds."""
    backend, size, launcher = LAUNCHERS[request.param]
    directory = tmp_path_factory.mktemp("seen")
    arguments = [backend, str(size)], list(map(str, free_ports(4)))
    environ = {**os.environ, "TMPDIR": str(directory), "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        jobs = []
        for replica in range(2):
            command = [
                *launcher,
                str(PROGRAM),
                *arguments[0],
                str(replica),
                *arguments[1],
                str(directory / str(replica)),
            ]
            job = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            stack.callback(job.kill)
            jobs.append(stack.enter_context(job))
        outputs = [job.communicate(timeout=120)[0] for job in jobs]
    assert [0, 0] == [job.returncode for job in jobs], outputs
    return size, [json.loads((directory / str(replica)).read_text()) for replica in range(2)]


def places(size: int, dp_rank: int, dp_size: int) -> list[dict[str, Any]]:
    """Where the ranks of a replica are in a world of ``dp_size`` replicas."""
    total = size * dp_size
    ranks = range(dp_rank * size, (dp_rank + 1) * size)
    return [
        {
            "rank": rank,
            "world_size": total,
            "dp_rank": dp_rank,
            "dp_size": dp_size,
            "sums": {
                "tp": sum(ranks) + size,
                "dp": sum(range(rank % size, total, size)) + dp_size,
                "world": sum(range(total)) + total,
            },
        }
        for rank in ranks
    ]


def without_model(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Places without the number that stands for the model."""
    return [{name: value for name, value in place.items() if name != "model"} for place in found]


def models(found: list[dict[str, Any]]) -> list[int]:
    """The numbers that stand for the models."""
    return [place["model"] for place in found]


def test_one_to_two_to_one(seen: Seen) -> None:
    """Alone, one of two, alone: ranks, sizes and the sums of real collectives are those of each world."""
    size, replicas = seen
    for replica, worlds in enumerate(replicas):
        assert places(size, 0, 1) == without_model(worlds["alone"])
        assert places(size, replica, 2) == without_model(worlds["two"])
        assert places(size, 0, 1) == without_model(worlds["alone again"])


def test_the_model_stays(seen: Seen) -> None:
    """No world makes a worker load again."""
    for worlds in seen[1]:
        assert models(worlds["alone"]) == models(worlds["two"]) == models(worlds["alone again"])


def test_a_request_that_cannot_work_changes_nothing(seen: Seen) -> None:
    """Without a port for a world of several ranks: refused, and the replica is where it was."""
    for worlds in seen[1]:
        assert ("ConfigError", "ready") == (worlds["refused"]["type"], worlds["refused"]["state"])
        assert worlds["alone again"] == worlds["after refused"]


def test_a_world_that_nobody_comes_to(seen: Seen) -> None:
    """The error names rank and address within the distributed time-out.

    One rank is on its own again and goes on; a replica of several has FAILED, and can be restarted.
    """
    size, replicas = seen
    nobody = replicas[0]["nobody"]
    assert "WorldJoinError" == nobody["type"]
    assert f" of {2 * size} could not join the world at tcp://127.0.0.1:" in nobody["text"]
    assert nobody["seconds"] < 20.0
    assert ("ready" if size == 1 else "failed") == nobody["state"]
    assert places(size, 0, 1) == without_model(replicas[0]["after nobody"])
    if size == 1:
        assert models(replicas[0]["alone"]) == models(replicas[0]["after nobody"])


def test_a_rank_can_be_shut_down(seen: Seen) -> None:
    """`SHUTDOWN_CURRENT_RANK` leaves the world and closes the executor."""
    assert ["closed", "closed"] == [worlds["end"] for worlds in seen[1]]
