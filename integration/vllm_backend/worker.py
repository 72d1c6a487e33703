"""A rank's side: vLLM's worker, built and ended as exec-core asks for it."""

from __future__ import annotations

import contextlib
import glob
import os
from typing import Any

from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
from vllm.envs import enable_envs_cache
from vllm.logger import configure_logging
from vllm.platforms import current_platform
from vllm.v1.worker.worker_base import WorkerWrapperBase

import exec_core as ec


class VllmWorker(WorkerWrapperBase):  # type: ignore[misc] # vLLM has no types here
    """vLLM's wrapper around the worker class of its configuration; any other method is the worker's own.

    Args:
        context: exec-core's; vLLM selects the device and joins the process groups itself.
        vllm_config: the engine's `VllmConfig`.
    """

    def __init__(self, context: ec.WorkerContext, vllm_config: Any) -> None:
        super().__init__(rpc_rank=context.local_rank, global_rank=context.rank)
        self._meeting = _init_method(context)
        if logging_config := getattr(vllm_config, "logging_config", None):
            configure_logging(logging_config)
        kwargs = {
            "vllm_config": vllm_config,
            "local_rank": context.local_rank,
            "rank": context.rank,
            "distributed_init_method": self._meeting,
            "is_driver_worker": context.rank % vllm_config.parallel_config.tensor_parallel_size == 0,
        }
        self.init_worker([kwargs] * context.world_size)  # of which it takes its own

    def load_model(self) -> None:
        """Loads, and settles what vLLM decides then. All ranks have met."""
        self._unlink_shared_memory()
        self.worker.load_model()
        current_platform.update_block_size_for_backend(self.vllm_config)
        enable_envs_cache()

    def shutdown(self) -> None:
        """Ends the worker and leaves its process groups."""
        self._unlink_shared_memory()
        super().shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()

    def _unlink_shared_memory(self) -> None:
        """Takes the names from the segments that CPU ranks have mapped by now, so that none stays, whatever ends them."""
        for path in glob.glob(f"/dev/shm/{os.path.basename(self._meeting)}*"):  # noqa: S108 # where Linux has them
            with contextlib.suppress(FileNotFoundError):  # another rank was first
                os.unlink(path)


def _init_method(context: ec.WorkerContext) -> str:
    """A file of this generation's own, which goes when the generation ends, whatever ends it.

    vLLM makes names for shared memory of the last part, so exec-mp's own meeting place would not do: a number of a descriptor.
    """
    root = os.path.dirname(context.private_dir)
    return f"file://{root}/world-{os.path.basename(root)}"
