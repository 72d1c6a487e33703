"""A rank's side: vLLM's worker, built and ended as exec-core asks for it."""

from __future__ import annotations

import contextlib
import glob
import os
from typing import Any

import torch
from vllm import envs
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
from vllm.envs import enable_envs_cache
from vllm.logger import configure_logging
from vllm.platforms import current_platform
from vllm.platforms.interface import set_assigned_physical_gpu_ids
from vllm.tracing import maybe_init_worker_tracer
from vllm.utils.torch_utils import OMP_NUM_THREADS_SET_BY_VLLM
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.executor.vllm_net_devices import set_worker_net_device
from vllm.v1.worker.worker_base import WorkerWrapperBase

import exec_core as ec


class VllmWorker(WorkerWrapperBase):  # type: ignore[misc] # vLLM has no types here
    """vLLM's wrapper around the worker class of its configuration; any other method is the worker's own.

    Args:
        context: exec-core's; vLLM selects the device and joins the process groups itself.
        vllm_config: the engine's `VllmConfig`.
        token: what no other executor's shared memory is named by.
        init_method: where the ranks meet; None: in a file of their own.
    """

    def __init__(self, context: ec.WorkerContext, vllm_config: Any, token: str, init_method: str | None) -> None:
        super().__init__(rpc_rank=context.local_rank, global_rank=context.rank)
        self._context = context
        self._meeting = init_method or _file_init_method(context, token)
        if logging_config := getattr(vllm_config, "logging_config", None):
            configure_logging(logging_config)
        if os.environ.get(OMP_NUM_THREADS_SET_BY_VLLM) == "1":  # torch has read the fork server's, which may be none
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        _choose_network_device(context.local_rank, vllm_config)
        maybe_init_worker_tracer("vllm.worker", "worker", f"Worker_{context.rank}")
        kwargs = {
            "vllm_config": vllm_config,
            "local_rank": context.local_rank,
            "rank": context.rank,
            "distributed_init_method": self._meeting,
            "is_driver_worker": context.rank % vllm_config.parallel_config.tensor_parallel_size == 0,
        }
        self.init_worker([kwargs] * context.world_size)  # of which it takes its own
        self._tell_name()

    def init_device(self) -> None:
        """Selects the device and joins the groups, as vLLM does."""
        super().init_device()
        if (device := getattr(self.worker, "device", None)) is not None:
            # CUDA keeps one for each thread, and exec-mp's second one is to finish async outputs with this.
            self._context.device_name = str(device)
        self._tell_name()

    def load_model(self) -> None:
        """Loads, and settles what vLLM decides then. All ranks have met."""
        self._unlink_shared_memory()
        if envs.VLLM_ELASTIC_EP_SCALE_UP_LAUNCH:  # its weights come from the replicas that are there already
            self.worker.elastic_ep_execute("load_model")
        else:
            self.worker.load_model()
        current_platform.update_block_size_for_backend(self.vllm_config)
        enable_envs_cache()

    def shutdown(self) -> None:
        """Ends the worker and leaves its process groups."""
        self._unlink_shared_memory()
        super().shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()

    def _tell_name(self) -> None:
        """Names the process in vLLM's own log, by its ranks once it has them."""
        WorkerProc.setup_proc_title_and_log_prefix(self.vllm_config.parallel_config.enable_expert_parallel)

    def _unlink_shared_memory(self) -> None:
        """Takes the names from the segments that CPU ranks have mapped by now, so that none stays, whatever ends them."""
        for path in glob.glob(f"/dev/shm/{os.path.basename(self._meeting)}*"):  # noqa: S108 # where Linux has them
            with contextlib.suppress(FileNotFoundError):  # another rank was first
                os.unlink(path)


def _choose_network_device(local_rank: int, vllm_config: Any) -> None:
    """Sets what ``VLLM_GPU_NIC_PCIE_MAPPING`` says of this rank's GPU, before any library reads it."""
    gpus = vllm_config.parallel_config.assigned_physical_gpu_ids
    if gpus is not None:
        set_assigned_physical_gpu_ids(gpus)
    set_worker_net_device(local_rank, vllm_config)


def _file_init_method(context: ec.WorkerContext, token: str) -> str:
    """A file of this generation's own, which goes when the generation ends, whatever ends it.

    vLLM makes names for shared memory of the last part, so exec-mp's own meeting place would not do: a number of a descriptor.
    """
    root = os.path.dirname(context.private_dir)
    return f"file://{root}/world-{os.path.basename(root)}-{token}"
