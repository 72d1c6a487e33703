"""What the tests of vLLM on exec-mp share: a checkpoint in vLLM's format, the expected tokens, and the program."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # where programs find their modules, and workers too

from exec_core.testing import eventually
from oracle import Oracle
from reference_llm.gguf_file import read_gguf
from reference_llm.options import default_model
from reference_llm.tokenizer import Tokenizer
from vllm_generate import SETTINGS

PROGRAM = Path(__file__).parents[1] / "vllm_generate.py"
START_S = 300.0  # vLLM's own takes tens of seconds on few cores
END_S = 60.0  # vLLM's client waits for its engine's process


def events(log: str) -> list[dict[str, Any]]:
    """exec-mp's part of a log: the lines of vLLM's own processes are text."""
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The model's."""
    return Tokenizer(read_gguf(default_model()))


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """The model in transformers."""
    return Oracle(default_model())


@pytest.fixture(scope="session")
def checkpoint(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model as vLLM reads it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    oracle.model.save_pretrained(directory)
    return str(directory)


class Program:
    """The program, started."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self._out, self._log = directory / "out", directory / "log"
        with self._out.open("w") as out, self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), "--json", *arguments], stdout=out, stderr=log
            )
        self._all = [psutil.Process(self.process.pid)]

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    def answer(self) -> dict[str, Any]:
        """Waits until it has ended well. What it has printed, and the ranks that have logged something."""
        assert self.process.wait(START_S) == 0, self.log[-4000:]
        answer: dict[str, Any] = json.loads(self._out.read_text().splitlines()[-1])
        return {**answer, "ranks": {event.get("rank") for event in events(self.log)} - {None}}

    def generates(self) -> None:
        """Waits until it has been given a token by all ranks; hundreds follow."""
        eventually(lambda: "generating\n" in self.log or self.process.poll() is not None, deadline_s=START_S)
        assert self.process.poll() is None, self.log[-4000:]
        self._all += self._all[0].children(recursive=True)

    def pid_of(self, rank: int) -> int:
        """The process of a rank, from what it has logged."""
        return next(int(event["pid"]) for event in events(self.log) if event.get("rank") == rank)

    def fails(self) -> str:
        """Waits until it has ended with an error, and all its processes are gone. What it has logged."""
        assert self.process.wait(END_S) != 0
        eventually(lambda: not any(process.is_running() for process in self._all), deadline_s=END_S)
        return self.log


@pytest.fixture
def start(checkpoint: str, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts the program, once in a test."""
    started: list[Program] = []

    def started_with(*arguments: str) -> Program:
        started.append(Program(tmp_path, "--model", checkpoint, *arguments))
        return started[-1]

    yield started_with
    for program in started:
        program.process.kill()
        program.process.wait()
    assert not list(Path("/dev/shm").glob("world-exec-*"))  # noqa: S108 # only listed


@pytest.fixture(scope="session")
def vllm_config(checkpoint: str) -> Iterator[Callable[..., Any]]:
    """Makes a `VllmConfig` of two ranks, a stage each, whose worker has no model; arguments are those of `EngineArgs`."""
    plain = {
        "model": checkpoint,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 64,
        "enforce_eager": True,
        "pipeline_parallel_size": 2,
        "worker_cls": "vllm_tests.plain_worker.PlainWorker",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        from vllm import EngineArgs

        from vllm_backend.executor import ExecMpExecutor

        plain["distributed_executor_backend"] = ExecMpExecutor
        yield lambda **arguments: EngineArgs(**{**plain, **arguments}).create_engine_config()


@pytest.fixture(scope="session")
def start_executor(vllm_config: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Starts executors for it, in an environment with the variables that it is given; they end with the tests."""
    import torch

    from vllm_backend.executor import ExecMpExecutor

    started: list[Any] = []

    def executor(**environment: str) -> Any:
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            started.append(ExecMpExecutor(vllm_config()))
        torch.set_num_threads(threads)  # an engine's process leaves the cores to the workers
        return started[-1]

    yield executor
    for one in started:
        one.shutdown()


@pytest.fixture(scope="session")
def executor(start_executor: Callable[..., Any]) -> Any:
    """One as vLLM sets it up by default."""
    return start_executor()


@pytest.fixture(scope="session")
def set_up_executor(start_executor: Callable[..., Any]) -> Any:
    """One that vLLM was told something by environment variables, and whose workers are ill."""
    return start_executor(
        VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS="1",
        VLLM_ELASTIC_EP_SCALE_UP_LAUNCH="1",
        OMP_NUM_THREADS="3",
        VLLM_OMP_NUM_THREADS_SET_BY_VLLM="1",
        PLAIN_WORKER_IS_ILL="1",
    )
