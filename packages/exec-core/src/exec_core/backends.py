"""Finds backends through the entry-point group ``exec_core.executors``; core itself knows none."""

from __future__ import annotations

from typing import Any

from exec_core.base import OnProgress
from exec_core.config import ExecutorConfig
from exec_core.errors import BackendNotFoundError, ConfigError
from exec_core.executor import Executor

GROUP = "exec_core.executors"
_DISTRIBUTIONS = {"mp": "exec-mp", "uniproc": "exec-uniproc", "torchrun": "exec-torchrun"}


def entry_points(group: str) -> Any:
    """The installed entry points of ``group``."""
    from importlib import metadata  # as much work to import as the rest of this package

    return metadata.entry_points(group=group)


def find_backend(backend: str | type[Any]) -> type[Executor]:
    """The executor class for ``ExecutorConfig.backend``.

    Raises:
        BackendNotFoundError: with the line that installs it, where the name is known.
        ConfigError: when what is found is no `Executor`.
    """
    found: Any = backend
    if isinstance(backend, str):
        installed = {entry.name: entry for entry in entry_points(group=GROUP)}
        if backend not in installed:
            name = _DISTRIBUTIONS.get(backend)
            remedy = (
                f"install it with: pip install {name}" if name else f"known are {', '.join(sorted(_DISTRIBUTIONS))}"
            )
            raise BackendNotFoundError(backend, sorted(installed), remedy)
        found = installed[backend].load()
    if not (isinstance(found, type) and issubclass(found, Executor)):
        raise ConfigError("ExecutorConfig.backend", "must be the name of a backend or an Executor class", backend)
    return found


def create_executor(config: ExecutorConfig, *, on_progress: OnProgress | None = None) -> Executor:
    """Starts the executor that ``config`` describes and returns it ready.

    Args:
        on_progress: ``fn(rank, done, total, what)`` for what workers report while they load; see `Executor`.

    Raises:
        BackendNotFoundError, ConfigError, DeviceError: before anything is started.
        WorkerStartupError: when a worker does not become ready; nothing is left running.
    """
    return find_backend(config.backend)(config, on_progress=on_progress)
