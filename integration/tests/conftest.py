"""What the integration tests share: the device, the models, the oracle, and a check for leftovers after each test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import pytest
import torch

import exec_mp
from exec_core import create_executor
from exec_core.testing import leak_check

sys.path.insert(0, str(Path(__file__).parents[1]))  # where programs find their modules, and workers too

from oracle import Oracle
from reference_llm.engine import Engine, GenerationRequest
from reference_llm.gguf_file import read_gguf
from reference_llm.hparams import Hparams
from reference_llm.options import default_model, executor_config, parse, share_threads
from tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="session")
def device() -> str:
    """``cpu`` or ``cuda``, from EXEC_TEST_DEVICE."""
    return os.environ.get("EXEC_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session", autouse=True)
def _context(device: str) -> None:
    """What CUDA opens and starts in this process is here before any test looks for what is left behind."""
    if device == "cuda":
        torch.zeros(1, device="cuda")


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a test that leaves a process, descriptor, thread or file behind. Only the fork server stays."""
    exec_mp.prestart()
    tmp_path_factory.getbasetemp()  # made now, outside the directory that the check must find empty
    with leak_check():
        yield


@pytest.fixture(scope="session")
def model() -> str:
    """Path of SmolLM2-135M-Instruct."""
    return default_model()


@pytest.fixture(scope="session")
def oracle(model: str, device: str) -> Oracle:
    """The same model in transformers."""
    return Oracle(model, device)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a model of four small layers with random weights."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@attrs.define
class Outcome:
    """What became of one request."""

    tokens: list[int] = attrs.field(factory=list)
    finish: str | None = None
    error: str | None = None


Answer = Callable[[str, Sequence[str], Sequence[GenerationRequest]], list[Outcome]]


@pytest.fixture
def answer(device: str) -> Answer:
    """Answers requests with a model file and an executor of its own, which the program's options describe."""

    def run(path: str, options: Sequence[str], requests: Sequence[GenerationRequest]) -> list[Outcome]:
        file = read_gguf(path)
        hparams = Hparams.from_gguf(file)
        # One thread: two that wait for each other on cores that others use too take twenty times as long.
        config = executor_config(parse(["--device", device, "--threads", "1", *options, "-"], ""), file, hparams)
        outcomes = [Outcome() for _ in requests]
        share_threads(config)
        with create_executor(config) as executor:
            for event in Engine(executor, hparams).generate(requests):
                outcome = outcomes[event.index]
                outcome.tokens += [] if event.token is None else [event.token]
                outcome.finish, outcome.error = event.finish, event.error
        return outcomes

    return run
