"""What the launcher says: who this process is, and where the world meets. Checked before anything is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import attrs

from exec_core.config import ParallelConfig
from exec_core.errors import ConfigError

_REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@attrs.frozen
class LauncherEnv:
    """This process's place, as the launcher's environment variables give it.

    Attributes:
        rank, world_size: in the whole world, replicas included.
        local_rank: on this machine; it picks the device.
        local_world_size: ranks on this machine, or None where the launcher does not say.
        master_addr, master_port: where rank 0 can be reached.
        replica_size: ranks of one replica.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    master_addr: str
    master_port: int
    replica_size: int

    @property
    def replica(self) -> int:
        """Number of this rank's replica: its data-parallel rank."""
        return self.rank // self.replica_size

    @property
    def index(self) -> int:
        """This rank's position in its replica."""
        return self.rank % self.replica_size

    @property
    def is_one_machine(self) -> bool:
        """Whether all ranks are known to be on this machine."""
        return self.local_world_size == self.world_size

    @property
    def least_local_size(self) -> int:
        """How many ranks this machine has, at least."""
        return self.local_world_size or self.local_rank + 1


def read_env(parallel: ParallelConfig, env: Mapping[str, str] | None = None) -> LauncherEnv:
    """The launcher's variables, checked one by one and against ``parallel`` and the host's process group.

    Args:
        env: default: this process's environment.

    Raises:
        ConfigError: naming the variable, with a command line that would work.
    """
    env = os.environ if env is None else env
    wanted = parallel.world_size * parallel.data_parallel_size
    remedy = _remedy(parallel)
    missing = [name for name in _REQUIRED if not env.get(name)]
    if missing:
        raise ConfigError(f"environment variable {', '.join(missing)}", "must be set by a launcher", None, remedy)
    world_size = _number(env, "WORLD_SIZE", 1, None, remedy)
    rank = _number(env, "RANK", 0, world_size - 1, remedy)
    local_size = _number(env, "LOCAL_WORLD_SIZE", 1, world_size, remedy) if env.get("LOCAL_WORLD_SIZE") else None
    # A rank is never below its number on its own machine: that would leave fewer ranks than the machine has.
    local_rank = _number(env, "LOCAL_RANK", 0, rank if local_size is None else min(rank, local_size - 1), remedy)
    port = _number(env, "MASTER_PORT", 1, 65535, remedy)
    if world_size != wanted:
        sizes = (
            f"{parallel.data_parallel_size} (data parallel) x {parallel.tensor_parallel_size} (tensor parallel)"
            f" x {parallel.pipeline_parallel_size} (pipeline parallel) = {wanted}"
        )
        raise ConfigError("environment variable WORLD_SIZE", f"must be {sizes}", world_size, remedy)
    _check_existing_group(rank, world_size)
    return LauncherEnv(rank, world_size, local_rank, local_size, env["MASTER_ADDR"], port, parallel.world_size)


def _number(env: Mapping[str, str], name: str, least: int, most: int | None, remedy: str) -> int:
    text = env[name].strip()
    rule = f"must be an integer >= {least}" if most is None else f"must be an integer from {least} to {most}"
    digits = text.removeprefix("-")
    number = int(text) if digits.isascii() and digits.isdigit() else None
    if number is None or number < least or (most is not None and number > most):
        raise ConfigError(f"environment variable {name}", rule, env[name], remedy)
    return number


def _remedy(parallel: ParallelConfig) -> str:
    ranks = parallel.world_size * parallel.data_parallel_size
    name = os.path.basename(sys.argv[0])
    program = name if name.endswith(".py") and not name.startswith("__") else "program.py"
    return f"start it with: torchrun --nproc-per-node {ranks} {program}"


def _check_existing_group(rank: int, world_size: int) -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    found = distributed.get_rank(), distributed.get_world_size()
    if found != (rank, world_size):
        raise ConfigError(
            "the default process group", f"must be rank {rank} of {world_size}, as the environment says",
            f"rank {found[0]} of {found[1]}", "make it with torch.distributed.init_process_group('...', init_method='env://')",
        )  # fmt: skip
