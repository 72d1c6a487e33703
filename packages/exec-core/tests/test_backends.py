"""Backends are found by name among what is installed, or given as a class."""

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

from exec_core import BackendNotFoundError, ConfigError, Executor, ExecutorConfig, Worker, backends, create_executor
from exec_core.testing.workers import EchoWorker


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """What the packaging metadata lists; empty at first."""
    listed: list[EntryPoint] = []
    monkeypatch.setattr(backends, "entry_points", lambda group: EntryPoints(p for p in listed if p.group == group))
    return listed


def config(backend: Any) -> ExecutorConfig:
    """A configuration for ``backend``."""
    return ExecutorConfig(worker_cls=Worker, backend=backend)


@pytest.mark.parametrize(
    ("backend", "line"),
    [("mp", "pip install exec-mp"), ("uniproc", "pip install exec-uniproc"), ("torchrun", "pip install exec-torchrun")],
)
def test_known_backend_that_is_not_installed(installed: list[EntryPoint], backend: str, line: str) -> None:
    """A backend of ours that is not installed is an error with the line that installs it."""
    for find in (create_executor, Executor.get_class):
        with pytest.raises(BackendNotFoundError, match=line) as caught:
            find(config(backend))
        assert (backend, ()) == (caught.value.backend, caught.value.available)


def test_unknown_backend(installed: list[EntryPoint]) -> None:
    """A name that nobody knows says which ones there are."""
    installed.append(EntryPoint("mine", "exec_core.executor:Executor", backends.GROUP))
    with pytest.raises(BackendNotFoundError) as caught:
        create_executor(config("ray"))

    assert ("ray", ("mine",)) == (caught.value.backend, caught.value.available)
    assert "installed: mine" in str(caught.value)
    assert "known are mp, torchrun, uniproc" in str(caught.value)


def test_backend_of_another_package(installed: list[EntryPoint]) -> None:
    """Any package can provide a backend through the entry point."""
    installed.append(EntryPoint("mine", "exec_core.executor:Executor", backends.GROUP))

    assert Executor is Executor.get_class(config("mine"))


def test_class_as_backend() -> None:
    """A class is used as it is."""
    assert Executor is Executor.get_class(config(Executor))


def test_class_that_is_no_executor() -> None:
    """A class that is no executor is refused."""
    with pytest.raises(ConfigError, match=r"ExecutorConfig.backend must be"):
        create_executor(config(EchoWorker))


def test_entry_point_that_is_no_executor(installed: list[EntryPoint]) -> None:
    """So is an entry point that leads to something else."""
    installed.append(EntryPoint("mine", "exec_core.worker:Worker", backends.GROUP))
    with pytest.raises(ConfigError, match=r"ExecutorConfig.backend must be"):
        create_executor(config("mine"))
