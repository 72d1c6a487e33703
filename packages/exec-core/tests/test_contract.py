"""A backend that somebody else writes keeps the contract, with what exec-core alone gives its author."""

from typing import ClassVar

from exec_core import Executor, WorkerInit
from exec_core.config import DeviceConfig
from exec_core.errors import ConfigError
from exec_core.inprocess import InProcessGroup
from exec_core.testing import ExecutorContract


class ThirdPartyExecutor(Executor):
    """One worker in this process: the smallest backend there can be."""

    backend: ClassVar[str] = "third-party"

    def _launch(self, deadline: float) -> InProcessGroup:
        if self.config.parallel.data_parallel_size != 1:
            size = self.config.parallel.data_parallel_size
            raise ConfigError(
                "ParallelConfig.data_parallel_size", "must be 1 with this backend", size, "use backend 'mp'"
            )
        init = WorkerInit(
            config=self.config,
            rank=0,
            local_rank=0,
            distributed_init_method=None,
            device_name=None if self.config.device.device == "none" else "cpu",
            private_root=self._private_root,
            executor="third-party",
            backend=self.backend,
            generation=self.generation,
            in_driver=True,
        )
        return InProcessGroup(init, self._room, self._report_progress)


class TestThirdParty(ExecutorContract):
    """A class as backend: nothing is registered anywhere."""

    backend = ThirdPartyExecutor
    local_ranks = frozenset({0})


def test_device_none_is_the_default_of_nothing() -> None:
    """The smallest backend above handles what it is given; the default device is chosen by real ones."""
    assert "auto" == DeviceConfig().device
