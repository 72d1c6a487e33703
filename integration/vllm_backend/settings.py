"""What vLLM was asked for, in exec-core's terms, and what of it exec-mp's workers cannot have."""

from __future__ import annotations

import os
import secrets
from typing import Any

from vllm import envs
from vllm.multimodal.cache import worker_receiver_cache_from_config
from vllm.utils.network_utils import (
    aiter_requires_tcp_store,
    get_distributed_init_method,
    get_loopback_ip,
    get_open_port,
)
from vllm.utils.ompmultiprocessing import OMPProcessManager

import exec_core as ec
from vllm_backend.worker import VllmWorker

# What every worker imports, read once by the fork server. vLLM's worker module is named by its platform.
PRELOAD = ("torch", "vllm")
_AT_ONCE_S = 0.1  # for all of an end without grace: a limit must be more than nothing


def executor_config(vllm_config: Any) -> ec.ExecutorConfig:
    """What vLLM was asked for. Devices, groups and threads are the worker's own matter.

    Raises:
        ConfigError: for a setting that exec-mp's workers cannot honour, naming it, why, and what to do instead.
    """
    refuse_unsupported(vllm_config)
    parallel = vllm_config.parallel_config
    return ec.ExecutorConfig(
        worker_cls=VllmWorker,
        worker_kwargs={
            "vllm_config": vllm_config,
            # Containers that share /dev/shm may have processes of the same id, which everything else is named by.
            "token": secrets.token_hex(16),
            "init_method": _tcp_init_method() if aiter_requires_tcp_store() else None,
        },
        worker_env=_worker_env(vllm_config),
        backend="mp",
        parallel=ec.ParallelConfig(
            tensor_parallel_size=_ranks_of_a_stage(parallel),
            pipeline_parallel_size=parallel.pipeline_parallel_size,
        ),
        device=ec.DeviceConfig(device="none"),
        rpc=ec.RpcConfig(
            execute_model_timeout_s=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            startup_timeout_s=None,  # vLLM has a limit of its own, which loading a large model may well take
            # vLLM's is for workers that end by themselves; exec-mp gives them half of what the whole end may take.
            shutdown_timeout_s=2.0 * max(0, envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS) or _AT_ONCE_S,
            preload=PRELOAD,
        ),
    )


def refuse_unsupported(vllm_config: Any) -> None:
    """Raises for what vLLM's `MultiprocExecutor` does and this cannot.

    Raises:
        ConfigError: naming the setting, why, and what to do instead.
    """
    parallel, ec_transfer = vllm_config.parallel_config, vllm_config.ec_transfer_config
    own = "or take vLLM's own executor (distributed_executor_backend='mp')"
    if parallel.nnodes_within_dp > 1:
        rule = "must be 1: exec-mp's workers are all on this machine"
        raise ec.ConfigError("nnodes", rule, parallel.nnodes_within_dp, f"lower it, {own}")
    if parallel.numa_bind:
        rule = "must be off: it binds what multiprocessing starts, and exec-mp's workers come from a fork server"
        remedy = "start the program under numactl, whose binding the workers inherit"
        raise ec.ConfigError("numa_bind", rule, parallel.numa_bind, f"{remedy}, {own}")
    if ec_transfer is not None and ec_transfer.ec_connector == "ECCPUConnector" and _ranks_of_a_stage(parallel) > 1:
        # It would count one report of a load for done, and give memory away that the other ranks still read.
        rule = "must be another where a stage has several ranks: this one waits for all of them with vLLM's own executor only"
        raise ec.ConfigError("ec_connector", rule, ec_transfer.ec_connector, f"use one rank for each stage, {own}")
    if envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS <= 0:
        rule = "must be > 0: no step ends in no time"
        value = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
        raise ec.ConfigError("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", rule, value, "unset it for 300 s")
    try:
        worker_receiver_cache_from_config(vllm_config, None)
    except ValueError as error:  # what it says of the shared cache without the lock
        rule = "must not be 'shm': that cache needs a lock which only multiprocessing can hand on"
        raise ec.ConfigError("mm_processor_cache_type", rule, "shm", f"use 'lru', {own}") from error


def _ranks_of_a_stage(parallel: Any) -> int:
    return int(parallel.tensor_parallel_size * parallel.prefill_context_parallel_size)


def _tcp_init_method() -> str:
    """Where the ranks meet if AITER's all-reduce has them meet over TCP. On loopback."""
    return str(get_distributed_init_method(get_loopback_ip(), get_open_port()))


def _worker_env(vllm_config: Any) -> tuple[dict[str, str], ...]:
    """What binds each rank's OpenMP threads to cores, where vLLM computes on CPU and was not told to leave them free."""
    manager, ranks = OMPProcessManager(vllm_config), range(vllm_config.parallel_config.world_size)
    environments = []
    for rank in ranks:
        before = dict(os.environ)
        with manager.configure_omp_envs(rank=rank, local_rank=rank):
            environments.append({name: value for name, value in os.environ.items() if before.get(name) != value})
    return tuple(environments)
