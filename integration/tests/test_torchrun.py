"""The program under torchrun, on one host and on two: the same tokens as in one process, and one rank that prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest

PROGRAM = Path(__file__).parents[1] / "generate.py"
QUESTIONS = "What is the capital of France?\nList three fruits.\n"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
STANDALONE = (*TORCHRUN, "--standalone")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, device: str) -> list[str]:
    """What every run of the program is asked."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text(QUESTIONS)
    return ["--prompts", str(prompts), "--max-tokens", "12", "--threads", "1", "--device", device, "--json"]


@pytest.fixture(scope="module")
def expected(arguments: Sequence[str]) -> list[list[int]]:
    """The tokens of one process without torchrun."""
    command = [sys.executable, str(PROGRAM), "--backend", "uniproc", *arguments]
    return tokens(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The variables of a job, whose launcher leaves a directory for logs behind."""
    return {**os.environ, "TMPDIR": str(tmp_path)}


def run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What a job has printed."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


def tokens(out: str) -> list[list[int]]:
    """The answers' tokens, from what the program prints with --json; one summary comes last."""
    *answers, summary = map(json.loads, out.splitlines())
    assert ["summary"] == list(summary)
    return [answer["tokens"] for answer in sorted(answers, key=lambda answer: int(answer["index"]))]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((1, 2), id="pp2", marks=pytest.mark.cuda_devices(2)),
        pytest.param((3, 1), id="tp3", marks=pytest.mark.cuda_devices(3)),
    ],
)
def test_ranks_of_one_host(
    sizes: tuple[int, int], environment: Mapping[str, str], arguments: Sequence[str], expected: list[list[int]]
) -> None:
    """Pipeline or tensor parallel: the tokens of one process, printed once."""
    tensor, pipeline = sizes
    parallel = ["--tensor-parallel-size", str(tensor), "--pipeline-parallel-size", str(pipeline)]
    launcher = [*STANDALONE, "--nproc-per-node", str(tensor * pipeline), str(PROGRAM), "--backend", "torchrun"]
    done = run([*launcher, *parallel, *arguments], environment)
    assert done.returncode == 0, done.stderr
    assert expected == tokens(done.stdout)


def test_a_mistake_is_said_once(environment: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Sizes that do not fit the launched job: one line on stderr, not one for each rank."""
    launcher = [*STANDALONE, "--nproc-per-node", "2", str(PROGRAM), "--backend", "torchrun"]
    wrong = ["--pipeline-parallel-size", "3"]
    done = run([*launcher, *wrong, *arguments], environment)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("generate:")]
    assert "WORLD_SIZE must be 1 (data parallel) x 1 (tensor parallel) x 3 (pipeline parallel) = 3, got 2" in line


@attrs.frozen
class Host:
    """A network namespace with one end of a cable."""

    namespace: str
    interface: str
    address: str

    def command(self, *command: str) -> list[str]:
        """``command`` on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]


def ip(*arguments: str) -> None:
    """Runs the ip program."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(
            "this test makes two network namespaces and a cable between them, and may not: it needs root with "
            f"CAP_NET_ADMIN and CAP_SYS_ADMIN. ip {' '.join(arguments)}: {done.stderr.strip()}"
        )


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts that reach each other and nothing else."""
    name = uuid.uuid4().hex[:6]
    hosts = [Host(f"exec-{name}-{n}", f"e{name}{n}", f"10.213.77.{n + 1}") for n in range(2)]
    with ExitStack() as stack:
        for host in hosts:
            ip("netns", "add", host.namespace)
            stack.callback(ip, "netns", "delete", host.namespace)
        cable = [["name", host.interface, "netns", host.namespace] for host in hosts]
        ip("link", "add", *cable[0], "type", "veth", "peer", *cable[1])
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            ip("-n", host.namespace, "link", "set", host.interface, "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")
        yield hosts


@pytest.mark.cuda_devices(4)
def test_two_hosts(
    hosts: list[Host], environment: Mapping[str, str], arguments: Sequence[str], expected: list[list[int]]
) -> None:
    """Two ranks on each, four pipeline stages across both: the tokens of one process, printed by rank 0 alone."""
    sizes = ["--tensor-parallel-size", "1", "--pipeline-parallel-size", "4"]
    with ExitStack() as stack:
        jobs = [stack.enter_context(launch(host, hosts[0], environment, [*sizes, *arguments])) for host in hosts]
        for job in jobs:
            stack.callback(job.kill)
        outputs = [job.communicate(timeout=200) for job in jobs]
    assert [0, 0] == [job.returncode for job in jobs], outputs
    printed = [out for out, _ in outputs if out]
    assert [expected] == [tokens(out) for out in printed]


def launch(host: Host, meeting_point: Host, environment: Mapping[str, str], arguments: Sequence[str]) -> Any:
    """Torchrun on one host; the hosts find each other by its c10d rendezvous."""
    torchrun = [
        *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "2", "--local-addr", host.address,
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{meeting_point.address}:29400", "--rdzv-id", "two-hosts",
        "--rdzv-conf", f"is_host={int(host is meeting_point)}",
    ]  # fmt: skip
    # Both hosts have this machine's name, which leads nowhere in their network.
    environ = {**environment, "GLOO_SOCKET_IFNAME": host.interface}
    command = host.command(*torchrun, str(PROGRAM), "--backend", "torchrun", *arguments)
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
