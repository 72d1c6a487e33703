"""What the tests of exec-mp share: executors that are closed again, and a look at what they left behind."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import exec_core as ec
import exec_mp
from exec_core.testing import ExecutorContract, leak_check
from exec_core.testing.workers import EchoWorker

Launch = Callable[..., ec.Executor]


@pytest.fixture(scope="session", autouse=True)
def _suite_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the last test when anything is left after the fork server has been ended, too."""
    tmp_path_factory.getbasetemp()
    import torch  # noqa: F401 # what its import leaves open is not ours

    gc.collect()
    gc.freeze()  # a collection after each test need not go through all of torch again
    with leak_check():
        yield
        exec_mp.stop_fork_server()


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest, _suite_leaves_nothing: None) -> Iterator[None]:
    """Fails a test that leaves a process, descriptor, thread or file behind. Only the fork server stays."""
    if request.cls is not None and issubclass(request.cls, ExecutorContract):  # it checks for itself
        yield
        return
    exec_mp.prestart(())
    with leak_check():
        yield
        exec_mp.prestart(())  # a test that has ended the fork server gets a new one: they are equal to the check


@pytest.fixture
def launch(_leaves_nothing: None) -> Iterator[Launch]:
    """``launch(world=2, worker_cls=EchoWorker, *, gloo=False, device=None, parallel={}, rpc={}, log={}, **config)``: ready executors."""
    with contextlib.ExitStack() as stack:

        def launched(
            world: int = 2,
            worker_cls: Any = EchoWorker,
            *,
            gloo: bool = False,
            device: ec.DeviceConfig | None = None,
            parallel: dict[str, Any] | None = None,
            rpc: dict[str, Any] | None = None,
            log: dict[str, Any] | None = None,
            **config: Any,
        ) -> ec.Executor:
            # Importing torch into a new fork server takes longer than most tests.
            limits = {"timeout_s": 60.0, "startup_timeout_s": 60.0, "preload": ("torch",) if gloo else ()}
            executor = ec.create_executor(
                ec.ExecutorConfig(
                    worker_cls=worker_cls,
                    backend="mp",
                    parallel=ec.ParallelConfig(tensor_parallel_size=world, **(parallel or {})),
                    device=device
                    or ec.DeviceConfig(
                        device="cpu", threads_per_worker=1, distributed_backend=None if gloo else "none"
                    ),
                    rpc=ec.RpcConfig(**{**limits, **(rpc or {})}),
                    log=ec.LogConfig(**{"format": "json", "level": "critical", **(log or {})}),
                    **config,
                )
            )
            return stack.enter_context(executor)

        yield launched
