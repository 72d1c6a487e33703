"""The contract of surroundings: what a worker's process is given, and what the host's keeps."""

from __future__ import annotations

import os
import signal
import stat
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import attrs
import pytest

from exec_core.backends import create_executor
from exec_core.config import DeviceConfig
from exec_core.executor import Executor
from exec_core.testing import workers
from exec_core.testing.base import ContractBase, Start

WORKERS = "exec_core.testing.workers"


class EnvironmentContract(ContractBase):
    """Variables, threads, devices, directories, and other executors beside this one."""

    def test_environment_for_all(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """``worker_env`` is set in every rank before the worker's module is imported."""
        monkeypatch.setenv("EXEC_TEST_ALL", "host")
        executor = start(f"{WORKERS}:EchoWorker", worker_env={"EXEC_TEST_ALL": "yes"})

        assert ["yes"] * len(self.world()) == executor.collective_rpc(lambda worker: os.environ["EXEC_TEST_ALL"])
        assert ["yes"] * len(self.remote()) == executor.collective_rpc(
            lambda worker: sys.modules["exec_core.testing.workers"].ENVIRONMENT_AT_IMPORT["EXEC_TEST_ALL"],
            ranks=self.remote(),
        )
        if not self.local_ranks:
            assert os.environ["EXEC_TEST_ALL"] == "host"

    def test_environment_by_rank(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tuple of mappings gives each rank its own environment."""
        monkeypatch.setenv("EXEC_TEST_RANK", "host")
        executor = start(worker_env=tuple({"EXEC_TEST_RANK": f"rank {rank}"} for rank in self.world()))

        assert [f"rank {rank}" for rank in self.world()] == executor.collective_rpc(
            lambda worker: os.environ["EXEC_TEST_RANK"]
        )

    def test_update_environment_variables(self, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
        """The wrapper's own ``update_environment_variables`` can be called like a worker's method."""
        monkeypatch.setenv("EXEC_TEST_UPDATE", "host")
        executor.collective_rpc("update_environment_variables", args=({"EXEC_TEST_UPDATE": "new"},))

        assert ["new"] * len(self.world()) == executor.collective_rpc(lambda worker: os.environ["EXEC_TEST_UPDATE"])

    def test_host_is_left_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Starting, using and closing an executor changes no setting of the host's process."""
        if self.alone:
            self._close_shared()

        def settings() -> dict[str, Any]:
            import multiprocessing

            import torch

            return {
                "environment": dict(os.environ),
                "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
                "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
                "start method": multiprocessing.get_start_method(allow_none=True),
                "threads": torch.get_num_threads(),
                "affinity": os.sched_getaffinity(0),
                "directory": os.getcwd(),
                "path": list(sys.path),
                "wakeup": _wakeup_fd(),
            }

        before = settings()
        with create_executor(self.make_config()) as executor:
            executor.execute_model("r")
            executor.collective_rpc("where", non_block=True).result(30)
            during = settings()

        assert before == during
        assert before == settings()

    def test_threads_of_a_worker(self, start: Start) -> None:
        """``threads_per_worker`` is the number of torch's threads in a worker's own process."""
        executor = start(device=DeviceConfig(device="cpu", threads_per_worker=2))

        assert [2] * len(self.remote()) == executor.collective_rpc(
            lambda worker: __import__("torch").get_num_threads(), ranks=self.remote()
        )

    @pytest.mark.parametrize(
        "device",
        [DeviceConfig(device="none"), DeviceConfig(device="cpu", distributed_backend="none")],
        ids=["device", "group"],
    )
    def test_worker_on_its_own(self, start: Start, device: DeviceConfig) -> None:
        """Without a device, or without a distributed backend, workers join no process group and everything else works."""
        executor = start(device=device)
        expected = None if device.device == "none" else "cpu"

        assert [(None, expected)] * len(self.world()) == executor.collective_rpc(
            lambda worker: (worker.context.groups, worker.context.device and str(worker.context.device))
        )
        assert (executor.output_rank, "r") == executor.execute_model("r")

    def test_private_directory(self, start: Start) -> None:
        """Each rank has a directory that only its user can read, made when asked for and gone with the executor."""
        executor = start()
        assert [name for name in os.listdir(tempfile.gettempdir()) if not name.startswith("torchinductor")] == []
        paths = executor.collective_rpc(lambda worker: worker.context.private_dir)
        for path in paths:
            Path(path, "file").write_text("x")
        modes = [stat.S_IMODE(os.stat(each).st_mode) for path in paths for each in (path, os.path.dirname(path))]
        again = executor.collective_rpc(lambda worker: worker.context.private_dir)
        executor.shutdown()

        assert len(self.world()) == len(set(paths))
        assert paths == again
        assert [0o700] * (2 * len(paths)) == modes
        assert [False] * len(paths) == [os.path.exists(os.path.dirname(path)) for path in paths]

    def test_two_executors_at_once(self, executor: Executor) -> None:
        """A second executor in the same process is independent, but where torch allows only one default group."""
        if self.alone:
            return
        with create_executor(self.make_config(worker_kwargs={"second": True})) as second:
            assert [{"second": True}] * len(self.world()) == second.collective_rpc(lambda worker: worker.worker_kwargs)
            assert [{"shared": True}] * len(self.world()) == executor.collective_rpc(
                lambda worker: worker.worker_kwargs
            )
        assert [float(sum(self.world()))] * len(self.world()) == executor.collective_rpc(
            workers.add_up_ranks, args=("world",)
        )

    def test_config_can_be_used_again(self, start: Start) -> None:
        """One configuration starts any number of executors, one after the other."""
        config = self.make_config()
        for _ in range(2):
            with create_executor(attrs.evolve(config)) as executor:
                assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))


def _wakeup_fd() -> int:
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return fd
