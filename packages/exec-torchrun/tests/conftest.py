"""Programs of `programs/` as launched jobs: what each rank recorded, and what was left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

PROGRAMS = Path(__file__).parent / "programs"


@attrs.frozen
class Job:
    """A job that has ended.

    Attributes:
        ranks: what each rank recorded, by rank: the keywords of all its ``record`` calls.
        output: stdout and stderr of all its processes.
    """

    returncode: int
    ranks: dict[int, dict[str, Any]]
    output: str

    def of_all(self, name: str) -> list[Any]:
        """What the ranks recorded as ``name``, in rank order."""
        return [self.ranks[rank].get(name) for rank in sorted(self.ranks)]


Launch = Callable[..., Job]


def processes_of_session(session: int) -> list[str]:
    """Command lines of the processes that belong to a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(stat.with_name("cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def run_job(
    directory: Path, command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> Job:
    """Runs ``command``, in which every rank records into ``directory``, and checks that it leaves nothing behind."""
    temporary = directory / "tmp"  # of the job's own: torchrun leaves a directory for logs in it
    temporary.mkdir(parents=True, exist_ok=True)
    # What torchrun or a coverage run of ours sets for its own processes is not for these.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    environ = {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "RECORDS": os.fspath(directory),
        "TMPDIR": os.fspath(temporary),
        **(env or {}),
    }
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            pytest.fail(f"not done after {timeout_s:g} s:\n{output}")
    assert [] == processes_of_session(process.pid)
    assert [] == [path.name for path in temporary.iterdir() if not path.name.startswith("torchelastic_")]
    return Job(process.returncode, recorded(Path(environ["RECORDS"])), output)


def recorded(directory: Path) -> dict[int, dict[str, Any]]:
    """What each rank recorded there so far."""
    ranks: dict[int, dict[str, Any]] = {}
    for file in directory.glob("rank-*.jsonl"):
        for line in file.read_text().splitlines():
            ranks.setdefault(int(file.stem.removeprefix("rank-")), {}).update(json.loads(line))
    return ranks


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """``torchrun(nproc, program, *args, options=(), **how)`` runs a program of `programs/` on this machine.

    ``options`` are torchrun's; ``how`` is for `run_job`. The job must succeed, or fail where ``succeeds`` is false.
    """

    def launch(
        nproc: int, program: str, *args: str, options: Sequence[str] = (), succeeds: bool = True, **how: Any
    ) -> Job:
        # Standalone: a port of its own, with which some versions of torch do not start.
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        job = run_job(
            tmp_path_factory.mktemp("records"), [*launcher, *options, os.fspath(PROGRAMS / program), *args], **how
        )
        assert succeeds is (job.returncode == 0), job.output
        return job

    return launch


@pytest.fixture
def by_hand(tmp_path: Path) -> Callable[..., dict[int, dict[str, Any]]]:
    """``by_hand(world_size, ranks, program, *args)`` runs these ranks of a world with no launcher: what they recorded."""

    def launch(world_size: int, ranks: Sequence[int], program: str, *args: str) -> dict[int, dict[str, Any]]:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RECORDS": os.fspath(tmp_path)}
        world.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size)))

        def run(rank: int) -> Job:
            env = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            return run_job(tmp_path / str(rank), [sys.executable, os.fspath(PROGRAMS / program), *args], env)

        with ThreadPoolExecutor(world_size) as pool:
            jobs = list(pool.map(run, ranks))
        assert [0] * len(ranks) == [job.returncode for job in jobs], "\n".join(job.output for job in jobs)
        return recorded(tmp_path)

    return launch
